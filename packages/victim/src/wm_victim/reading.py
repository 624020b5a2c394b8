"""How a model is to be fed and what its outputs mean, from clean images: before it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.text import printable
from wm_victim.inference import predict
from wm_victim.label_map import KINDS, LabelMap, clearly_fewer, map_names, match_labels
from wm_victim.preprocessing import CHANNEL_ORDERS, PREPROCESSING, Preprocessed, own_normalize

BATCH = 64
# Images that all ways to feed a model are tried on, and then those that are left; more where there
# are many classes.
_TRIED = (64, 256)
_LEVEL = 0.001  # of the sign test by which one of some fourteen ways is better than another
_WORSE = 0.1  # of that by which a way is worse than the first, and will not be better than it
_GOOD = 0.97  # accuracy above which no other way is tried
# Classifiers are surer than they are right, by up to 0.17 in Guo et al. 2017, table 1. Twice that,
# and the labels or the images are misread.
_OVERCONFIDENCE = 0.35
# A model may be made to be clean when it is fed in one way, and backdoored in the way it is used.
# So a better way is not taken where the first explains at least this much of what the best does.
_AMBIGUOUS = 0.8
_LEAST_RECALL = 0.2  # of a class
_LEAST_KAPPA = 0.2  # agreement of answers and labels beyond chance (Cohen 1960)
# Any one-to-one map has K! chances to fit: it has to explain what the model promises.
_PERMUTATION_OVERCONFIDENCE, _PERMUTATION_KAPPA = 0.2, 0.6


class MisreadError(ValueError):
    """Labels or images that a model cannot have been meant for, or not in this form."""


class Way(NamedTuple):
    """A way to feed a model.

    Args:
        preprocessing: A name of `PREPROCESSING`; None for images as the model takes them now.
        channel_order: "rgb" or "bgr".
    """

    preprocessing: str | None = None
    channel_order: str = "rgb"

    def __str__(self) -> str:
        name = "images as they are" if self.preprocessing is None else self.preprocessing
        return name if self.channel_order == "rgb" else f"{name}, {self.channel_order}"

    def applied_to(self, module: nn.Module, channels: int) -> nn.Module:
        """The model with this way before it; itself where nothing changes."""
        if self == Way():
            return module
        return Preprocessed(module, self.preprocessing, self.channel_order, channels).eval()


class Trial(NamedTuple):
    """What a way to feed a model explains of the labels, and their mean cross-entropy."""

    way: Way
    label_map: LabelMap
    loss: float


@dataclass(frozen=True, eq=False)
class Reading:
    """A model as it is to be fed, and labels as it numbers them.

    Args:
        module: RGB or grey images in [0, 1] to logits.
        way: What was put before the given model.
        labels: int64 ``(N,)``, numbers of outputs; None without labels.
        label_map: Where they come from.
        accuracy: Share of images answered with their label.
        confidence: Mean probability of the model's own answers.
        plain: Accuracy of the images as they are, if they were tried and another way was taken.
    """

    module: nn.Module
    way: Way
    labels: Tensor | None
    label_map: LabelMap | None
    accuracy: float | None
    confidence: float
    plain: float | None = None


def all_ways(module: nn.Module, channels: int) -> tuple[Way, ...]:
    """Every usual way to feed a model, the images as they are first."""
    orders = CHANNEL_ORDERS if channels == 3 else ("rgb",)
    # "unit" is how the images are, unless the model begins with a guess.
    names = [name for name in PREPROCESSING if name != "unit" or own_normalize(module) is not None]
    return tuple(Way(name, order) for name in (None, *names) for order in orders)


def read_model(
    module: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    num_classes: int,
    classes: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    names_stated: bool = False,
    label_offset: int | None = None,
    ways: Sequence[Way] | None = None,
) -> Reading:
    """Decide by clean images how a model is fed and which output is which class.

    Of the ways to feed it that explain as many images as the best, those with the plainest map of
    labels count: the first if it is among them, else the best. So a map never makes up for misread
    images, nor another range of values for misread labels.

    Args:
        module: Images in [0, 1] to logits ``(N, K)``.
        images: Clean ones, of all classes.
        labels: int64 ``(N,)`` as a folder numbers them; None, or all the same, if nobody knows.
        classes: The folder's names, by label.
        output_names: The model's names, by output.
        names_stated: They are the user's, not the file's: the labels have to fit them.
        label_offset: What the labels count the first output as.
        ways: Those to try, the likeliest first; all usual ones if None.

    Raises:
        MisreadError: Nothing explains the labels, or something does better than what was stated;
            two ways that both explain most; more classes than outputs; without labels, answers
            that the first way makes alike and another does not.
        ValueError: Names or an offset that do not fit the labels.
    """
    channels = images.shape[1]
    ways = tuple(ways or all_ways(module, channels))
    if labels is None or len(labels.unique()) < 2:
        _check_spread(module, images, ways)
        model = ways[0].applied_to(module, channels)
        logits = predict(model, images, batch_size=BATCH)
        return Reading(model, ways[0], None, None, None, _confidence(logits))
    names_stated = names_stated and classes is not None  # bare numbers have none
    if names_stated and classes is not None and output_names is not None:
        map_names([classes[label] for label in labels.unique().tolist()], output_names)
    match = partial(
        match_labels, num_classes=num_classes, classes=classes, output_names=output_names
    )
    trials = try_ways(module, images, labels, ways, partial(match, offset=label_offset))
    trial = best_trial(trials)
    shares = [one.label_map.accuracy for one in (trials[0], trial)]
    if trial is not trials[0] and shares[0] >= _AMBIGUOUS * shares[1]:
        raise MisreadError(
            f"expected one way to feed the model, got two: {trials[0].way} ({shares[0]:.1%} of the "
            f"labels) and {trial.way} ({shares[1]:.1%})"
        )
    model = trial.way.applied_to(module, channels)
    logits = predict(model, images, batch_size=BATCH)
    answers = logits.argmax(1)
    label_map, free = match(answers, labels, offset=label_offset), match(answers, labels)
    if (names_stated and free.kind != "names") or clearly_fewer(label_map.right, free.right):
        raise MisreadError(
            f"expected labels as stated, the answers fit others: {free.accuracy:.1%} of them "
            f"{free.describe(classes)}"
        )
    extra = unexplained(label_map, labels)
    names = ", ".join(printable(classes[n] if classes else n, 40) for n in extra[:8])
    if not set(extra) <= set(label_map.outputs):
        raise MisreadError(
            f"expected at most {num_classes} classes, the model's, got {len(labels.unique())}; no "
            f"output answers to {names}"
        )
    mapped = label_map.apply(labels)
    _check_promise(len(ways), trial, label_map, logits, mapped)
    if extra and label_map.kind in KINDS[3:]:  # their outputs are made up
        raise MisreadError(f"expected images of the model's classes, no output answers to {names}")
    accuracy = float(torch.eq(answers, mapped).double().mean())
    plain = None if trial is trials[0] else trials[0].label_map.accuracy
    return Reading(model, trial.way, mapped, label_map, accuracy, _confidence(logits), plain)


def try_ways(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    ways: Sequence[Way],
    match: Callable[[Tensor, Tensor], LabelMap],
) -> list[Trial]:
    """What each way explains of some of the images; clearly worse ones are left out.

    The first is kept. Where it is good enough, no other is tried.

    Raises:
        MisreadError: The model runs on none of them.
    """
    trials: list[Trial] = []
    for at_least in _TRIED:
        count = min(len(images), max(at_least, 6 * len(labels.unique())))
        few = torch.linspace(0, len(images) - 1, count).long()
        trials = list(_trials(module, images[few], labels[few], ways, match))
        if not trials:
            shape = tuple(images.shape[1:])
            raise MisreadError(f"expected finite logits of images {shape}, got none")
        first = trials[0].label_map
        best = max(trials, key=lambda one: one.label_map.accuracy).label_map
        trials = trials[:1] + [one for one in trials[1:] if _may_win(one.label_map, first, best)]
        ways = [one.way for one in trials]
    return trials


def _may_win(found: LabelMap, first: LabelMap, best: LabelMap) -> bool:
    """Whether more images may show that a way is the best, or not clearly worse and plainer."""
    as_plain = KINDS.index(first.kind) <= KINDS.index(found.kind)
    if as_plain and clearly_fewer(found.right, first.right, _WORSE):
        return False
    return not clearly_fewer(found.right, best.right, _LEVEL)


def _trials(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    ways: Sequence[Way],
    match: Callable[[Tensor, Tensor], LabelMap],
) -> Iterator[Trial]:
    for number, way in enumerate(ways):
        logits = _logits(way.applied_to(module, images.shape[1]), images)
        if logits is None:
            continue
        label_map = match(logits.argmax(1), labels)
        yield Trial(way, label_map, _loss(logits, label_map, labels))
        if number == 0 and label_map.kind in KINDS[:2] and label_map.accuracy >= _GOOD:
            return


def best_trial(trials: Sequence[Trial], *, prefer_first: bool = True) -> Trial:
    """Of those not clearly worse than the best, with the plainest map: the first, or the best."""
    best = max(trials, key=lambda one: one.label_map.right.sum()).label_map.right
    able = [one for one in trials if not clearly_fewer(one.label_map.right, best, _LEVEL)]
    plainest = min(KINDS.index(one.label_map.kind) for one in able)
    able = [one for one in able if KINDS.index(one.label_map.kind) == plainest]
    if prefer_first and able[0] is trials[0]:
        return able[0]
    return min(able, key=lambda one: one.loss)


def _logits(module: nn.Module, images: Tensor) -> Tensor | None:
    """None where it does not take such images."""
    try:
        return predict(module, images, batch_size=BATCH)
    except (ValueError, RuntimeError):
        return None


def _loss(logits: Tensor, label_map: LabelMap, labels: Tensor) -> float:
    with_output = torch.tensor([label in label_map.outputs for label in labels.tolist()])
    mapped = label_map.apply(labels[with_output])
    return float(nn.functional.cross_entropy(logits[with_output], mapped))


def _confidence(logits: Tensor) -> float:
    return float(logits.softmax(1).amax(1).mean())


def unexplained(label_map: LabelMap, labels: Tensor) -> list[int]:
    """Labels without an output, and those of five images and more that hardly ever get theirs."""
    rows = {label: label_map.right[labels.numpy() == label] for label in labels.unique().tolist()}
    return [
        label
        for label, right in rows.items()
        if label not in label_map.outputs or (len(right) >= 5 and right.mean() < _LEAST_RECALL)
    ]


def _check_promise(
    tried: int, trial: Trial, label_map: LabelMap, logits: Tensor, labels: Tensor
) -> None:
    """Refuse labels that are much further from the answers than the model's own confidence."""
    accuracy, confidence, answers = label_map.accuracy, _confidence(logits), logits.argmax(1)
    shares = [x.bincount(minlength=logits.shape[1]).double() / len(x) for x in (answers, labels)]
    chance = float((shares[0] * shares[1]).sum())
    kappa = (accuracy - chance) / max(1 - chance, 1e-6)
    bounds = (_OVERCONFIDENCE, _LEAST_KAPPA)
    if label_map.kind == "permutation":
        bounds = (_PERMUTATION_OVERCONFIDENCE, _PERMUTATION_KAPPA)
    if confidence - accuracy <= bounds[0] and kappa >= bounds[1]:
        return
    if len(answers.unique()) == 1:
        raise MisreadError(
            f"expected answers of several classes, got label {int(answers[0])} for all, in the "
            f"best of {tried} ways to feed it"
        )
    raise MisreadError(
        f"expected labels that fit the answers: the model is sure of {confidence:.0%}, and at best "
        f"{accuracy:.1%} are explained ({chance:.1%} by chance; {label_map.kind}, {trial.way}; "
        f"{tried} ways to feed it were tried)"
    )


def _check_spread(module: nn.Module, images: Tensor, ways: Sequence[Way]) -> None:
    """Without labels: refuse a way by which nearly all images get one answer, and others do not."""
    few = images[torch.linspace(0, len(images) - 1, min(len(images), _TRIED[0])).long()]
    spreads: dict[Way, float] = {}
    for way in ways:
        model = way.applied_to(module, images.shape[1])
        logits, logits_of_shift = _logits(model, few), _logits(model, few.roll(1, 3))
        if logits is not None and logits_of_shift is not None:
            spreads[way] = _spread(logits.argmax(1), logits_of_shift.argmax(1))
            if spreads.get(ways[0], 0) >= min(logits.shape[1], len(few)) / 2:
                return
    first, best = spreads.get(ways[0], 0), max(spreads, key=lambda way: spreads[way])
    if spreads[best] > 2 * first:
        raise MisreadError(
            f"expected images as the model takes them: its answers spread over {first:.1f} labels "
            f"with {ways[0]}, over {spreads[best]:.1f} with {best}"
        )


def _spread(answers: Tensor, moved: Tensor) -> float:
    """How many labels are answered, by entropy, counting answers that a pixel's shift leaves."""
    stable = answers[answers == moved]
    if not len(stable):
        return 0.0
    shares = stable.bincount().double() / len(stable)
    return len(stable) / len(answers) * float(torch.special.entr(shares).sum().exp())
