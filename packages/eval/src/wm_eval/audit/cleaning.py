"""Unlearn what a scan names, as long as the model keeps what it knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defense_nc import Unlearning
from defense_nc.mitigations import DivergedError, RepairCost, repair_cost
from defense_nc.trigger import put_trigger
from defense_reverse.linear_head import FEW, NO_HEAD, find_head
from defense_reverse.mitigations import FineTuning, HeadUnlearning
from wm_eval.audit.budget import Budget
from wm_eval.audit.checks import Checked, Stated, check_model
from wm_eval.audit.conclusion import Audit
from wm_eval.audit.images import CleanImages
from wm_eval.audit.scan import LabelTrigger, all_triggers
from wm_eval.audit.unfold import fold, unfold
from wm_inject.core.images import quantize
from wm_victim.dataset_files import stratified_order
from wm_victim.inference import images_a_pass
from wm_victim.reading import Way

_STRENGTHS = (0.7, 1.0, 1.5)  # of a source's own trigger, which is reversed of few images


class Mixed(nn.Module):
    """Several triggers as one: each image gets one of them, in turn.

    Args:
        triggers: One or more.
    """

    def __init__(self, triggers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.triggers = nn.ModuleList(triggers)

    def forward(self, images: Tensor, *, ids: Tensor | None = None, **_: object) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] with the trigger of number ``id % count``."""
        turn = torch.arange(len(images), device=images.device) if ids is None else ids
        turn = turn % len(self.triggers)
        marked = images.clone()
        for number, trigger in enumerate(self.triggers):
            mine = turn == number
            if bool(mine.any()):
                marked[mine] = trigger(images[mine])
        return marked


class Cleaned(NamedTuple):
    """A cleaned model on the CPU, and what it cost."""

    model: nn.Module
    cost: RepairCost


def clean_model(
    module: nn.Module,
    triggers: Sequence[LabelTrigger],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    targets: Sequence[int] = (),
    max_loss: float = 0.05,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> Cleaned:
    """A copy of the model that has unlearned reversed triggers, all together.

    A fifth of the images is held out, to see what it costs. Images that the model answers otherwise
    than by their label are left out: either may be wrong.

    Args:
        module: Images in [0, 1] to logits; not changed.
        triggers: A fifth of the images carries each, half of them at most any. Images of a
            trigger's own source carry it in copies, weaker and stronger ones among them.
        labels: int64 ``(N,)``; the model's own answers if None.
        targets: Labels without a reversed trigger; the last layer unlearns them, and only this if
            there are no triggers.
        max_loss: Share of the images that it may cost, in (0, 1].

    Raises:
        ValueError: No triggers and no targets, targets that the last layer cannot unlearn, a model
            that is not left whole, or as `defense_nc.Unlearning`.
    """
    if not triggers and not targets:
        raise ValueError("expected reversed triggers to unlearn, got none")
    answers = answers_of(module, images)
    order = torch.from_numpy(stratified_order(answers.numpy(), seed=seed))
    held_out, rest = order.tensor_split([max(1, len(order) // 5)])
    if labels is not None:
        rest = rest[torch.eq(answers, labels)[rest]]
    rest = rest[answers[rest] >= 0]
    held_out_labels = None if labels is None else labels[held_out]
    if targets:
        module = _refitted(module, images[rest], answers[rest], targets, seed)
    if not triggers:
        cost = repair_cost(answers[held_out], answers_of(module, images[held_out]), held_out_labels)
        if cost.within(max_loss):
            return Cleaned(module, cost)
        raise ValueError(
            f"not cleaned: new weights in the last layer cost more than --max-loss {max_loss:g} "
            f"({cost})"
        )
    anywhere = [one.trigger for one in triggers if one.source is None]
    share = min(0.5, max(1, len(anywhere)) * Unlearning.preset("nc").trigger_share)
    unlearning = Unlearning.preset("nc", trigger_share=share)
    inputs, goals = _with_copies(images[rest], answers[rest], triggers)
    mixed = {0: copy.deepcopy(Mixed(anywhere)).to(device)} if anywhere else {}
    if not mixed and len(inputs) == len(rest):
        sources = sorted({one.source for one in triggers if one.source is not None})
        raise ValueError(
            f"not cleaned: no image is of label {', '.join(map(str, sources))}, on which the "
            "reversed trigger works"
        )
    start, folded = unfold(module, images)
    last: RepairCost | None = None
    # Networks without normalisation of their own may still not stand a rate that is right for
    # others: the first that leaves the model what it knew is taken.
    for half_decades in range(5):
        sgd = replace(unlearning.sgd, lr=unlearning.sgd.lr * 10 ** (-half_decades / 2))
        method: Unlearning | FineTuning = replace(unlearning, sgd=sgd)
        if not mixed:  # the copies are all that there is to unlearn
            method = FineTuning(sgd=replace(sgd, steps=unlearning.steps(len(inputs))))
        try:
            repaired = method.repair(
                start.to(device), inputs, goals, triggers=mixed, seed=seed, progress=progress
            )
        except DivergedError:
            continue
        cleaned = fold(repaired.model.cpu(), folded)
        after = answers_of(cleaned, images[held_out])
        cost = repair_cost(answers[held_out], after, held_out_labels)
        if cost.within(max_loss):
            return Cleaned(cleaned, cost)
        last = cost
    why = "it diverges" if last is None else f"{last} at the lowest"
    raise ValueError(
        f"not cleaned: unlearning costs more than --max-loss {max_loss:g} at every learning rate "
        f"({why})"
    )


def _with_copies(
    images: Tensor, labels: Tensor, triggers: Sequence[LabelTrigger]
) -> tuple[Tensor, Tensor]:
    """The images, and those of triggers' sources with them in it, under their own labels."""
    parts, goals = [images], [labels]
    for one in triggers:
        own = images[labels == one.source] if one.source is not None else images[:0]
        if not len(own):
            continue
        with torch.no_grad():
            change = put_trigger(one.trigger, own) - own
        parts += [quantize((own + times * change).clamp(0, 1)) for times in _STRENGTHS]
        goals += [labels[labels == one.source]] * len(_STRENGTHS)
    return torch.cat(parts), torch.cat(goals)


def _refitted(
    module: nn.Module, images: Tensor, labels: Tensor, targets: Sequence[int], seed: int
) -> nn.Module:
    """A copy whose last layer has unlearned labels that no trigger was reversed of."""
    suspected = {label: nn.Identity() for label in targets}
    try:
        return HeadUnlearning().repair(module, images, labels, triggers=suspected, seed=seed).model
    except ValueError as error:
        numbers = ", ".join(map(str, targets))
        raise ValueError(
            f"not cleaned: no detector reversed a trigger that reaches {numbers}, and the last "
            f"layer cannot unlearn it: {error}"
        ) from error


class Round(NamedTuple):
    """What one round of cleaning gave.

    Args:
        number: From 1.
        checked: The cleaned model, checked again.
        audit: What a scan says of it.
        labels: Those that it has unlearned, sorted.
        refitted: Those of them that it has unlearned in the last layer.
        obstacles: By other labels that stand out: why they were not unlearned.
        cost: What it cost.
    """

    number: int
    checked: Checked
    audit: Audit
    labels: tuple[int, ...]
    refitted: tuple[int, ...]
    obstacles: Mapping[int, str]
    cost: RepairCost


def labels_to_clean(found: Audit, label: int | None = None) -> tuple[int, ...]:
    """The given label, or all that stand out.

    Raises:
        ValueError: No label stands out.
    """
    labels = found.targets if label is None else (label,)
    if not labels:
        raise ValueError(f"not cleaned: no label stands out, the verdict is {found.verdict}")
    return labels


def clean_in_rounds(
    checked: Checked,
    clean: CleanImages,
    found: Audit,
    *,
    scan: Callable[[Checked], Audit],
    label: int | None = None,
    rounds: int = 3,
    max_loss: float = 0.05,
    seed: int = 0,
    budget: Budget | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Iterator[Round]:
    """Unlearn what a scan names, scan again, unlearn what that names as well, and so on.

    Every round starts from the given model and unlearns all triggers found so far, so that the
    bound on the loss of accuracy holds for all of them together. A label whose trigger no detector
    reversed is unlearned in the last layer, or kept where that cannot be.

    Args:
        checked: The model; not changed.
        clean: The defender's images.
        found: The scan of it.
        scan: Scans a model.
        label: Clean this label only, whatever the scan says; all that stand out if None.
        rounds: At most, 1 or more.
        max_loss: Share of the images that cleaning may cost, in (0, 1].
        budget: For the unlearning; ``scan`` keeps to its own.

    Yields:
        Each round; after the last one no label stands out, or nothing more can be done.

    Raises:
        ValueError: No rounds, or as `labels_to_clean` and `clean_model`; no label that can be
            unlearned.
    """
    if rounds < 1:
        raise ValueError(f"expected at least 1 round, got {rounds}")
    budget = budget or Budget()
    labels = set(labels_to_clean(found, label))
    triggers = all_triggers(found, sorted(labels))
    # Both are read by now.
    known_labels = replace(clean, labels=checked.labels, classes=None)
    as_it_is = Stated(ways=(Way(),))
    for number in range(1, rounds + 1):
        with budget.enforced():
            without_trigger = labels - {one.label for one in triggers}
            obstacles = _obstacles(checked, clean, without_trigger)
            targets = tuple(sorted(labels - {*obstacles}))
            refitted = tuple(sorted(without_trigger - {*obstacles}))
            if not targets:
                reasons = (f"label {label}: {why}" for label, why in obstacles.items())
                raise ValueError(f"not cleaned: {'; '.join(reasons)}")
            cleaned = clean_model(
                checked.module,
                triggers,
                clean.images,
                checked.labels,
                targets=refitted,
                max_loss=max_loss,
                seed=seed,
                progress=progress,
                device=device,
            )
            classes = len(cleaned.model(clean.images[:1])[0])
            again = check_model(cleaned.model, known_labels, num_classes=classes, stated=as_it_is)
        found = scan(again)
        yield Round(number, again, found, targets, refitted, obstacles, cleaned.cost)
        left = [one for one in found.targets if label in (None, one)]
        more = all_triggers(found, left)
        if not more and labels.issuperset(left):
            return
        labels.update(left)
        triggers += more


def _obstacles(checked: Checked, clean: CleanImages, labels: Iterable[int]) -> dict[int, str]:
    """By label without a reversed trigger: why the last layer cannot unlearn it, if it cannot."""
    targets = sorted(labels)
    if not targets:
        return {}
    nothing = "no detector reversed a trigger of it; "
    if not find_head(checked.module, clean.images[:FEW]):
        return dict.fromkeys(targets, nothing + NO_HEAD)
    answers = answers_of(checked.module, clean.images)
    if checked.labels is not None:
        answers = answers[answers == checked.labels]
    counts = {label: int((answers == label).sum()) for label in targets}
    # A fifth of them is held out.
    return {
        label: f"{nothing}expected two images of it or more, and of others, got {count} of "
        f"{len(answers)}"
        for label, count in counts.items()
        if count < 2 or count == len(answers)
    }


def answers_of(module: nn.Module, images: Tensor) -> Tensor:
    """The label of every image; -1 where the logits are NaN or infinite."""
    parts = images.split(images_a_pass(images, images.device, most=64))
    with torch.no_grad():
        logits = torch.cat([module(part) for part in parts])
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def success(
    module: nn.Module, triggers: Mapping[int, LabelTrigger], images: Tensor, classes: Tensor
) -> dict[int, float]:
    """By label, the share of images that its reversed trigger sends there, in [0, 1].

    Args:
        classes: int64 ``(N,)``; where a trigger has a source, images of it alone are counted.
    """
    rates = {}
    with torch.no_grad():
        for label, one in triggers.items():
            own = images if one.source is None else images[classes == one.source]
            marked = torch.cat([one.trigger(part) for part in own.split(64)])
            rates[label] = float((answers_of(module, marked) == label).double().mean())
    return rates
