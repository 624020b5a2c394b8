"""The smallest change that, made to every image of a group, sends each to its goal.

What a change does to images is an `Effect`: a picture is added, or a field of shifts warps. Several
groups are searched side by side, each for a change of its own, in passes that they share.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import EndlessBatches
from defense_nc.gradients import GradientCount, reached, vanished
from defense_reverse.detectors.common import batches_of
from wm_victim.inference import images_a_pass

# Times the size of the search: as far as a change is enlarged until it works on other images.
_FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
_HALVINGS = 3  # of the range between two of them, which ends 5 % wide


class Effect(Protocol):
    """What changes of one kind do to images. A change is a tensor; zeros change nothing."""

    def none(self, image: Tensor) -> Tensor:
        """The change of an image ``(C, H, W)`` that is none: zeros of the shape of a change."""
        ...

    def on(self, images: Tensor, change: Tensor) -> Tensor:
        """Changed images ``(N, C, H, W)``, in [0, 1]."""
        ...

    def gradient(self, images: Tensor, change: Tensor, gradients: Tensor) -> Tensor:
        """The gradient with respect to the change, from those with respect to changed images."""
        ...


class Addition:
    """Pictures ``(C, H, W)`` are added. Their gradient is that before pixels are clamped."""

    def none(self, image: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(image)

    def on(self, images: Tensor, change: Tensor) -> Tensor:  # noqa: D102
        return (images + change).clamp(0, 1)

    def gradient(self, images: Tensor, change: Tensor, gradients: Tensor) -> Tensor:  # noqa: D102
        return gradients.sum(0)


class Goals(NamedTuple):
    """Images and the label that each is to get."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor  # int64 (N,)


class Group(NamedTuple):
    """The images that one change is searched with, and those that it is measured on."""

    searched: Goals
    tested: Goals


class SmallChange(NamedTuple):
    """The smallest change of a group."""

    change: Tensor
    size: float  # its root mean square
    rate: float  # success on images that were not searched with
    starved: float  # as `ScanReport.starved`

    def stored(self) -> list[Any]:
        """As a checkpoint keeps it: a list, on the CPU."""
        return [self.change.cpu(), self.size, self.rate, self.starved]


class SearchSettings(NamedTuple):
    """As the arguments of `UniversalPerturbation` of these names, and more."""

    steps: int
    batch_size: int
    start: float
    floor: float
    growth: float = 1.25  # of the size in a step, until a change works for the first time
    most: float = 1.0  # the largest size of a change
    effect: Effect = Addition()


def split_group(images: Tensor, goals: Tensor, tested: int, random: torch.Generator) -> Group:
    """At most ``tested`` of the images, and at most a half, are for measuring: at random."""
    order = torch.randperm(len(images), generator=random).to(images.device)
    count = min(tested, (len(images) + 1) // 2)
    first, rest = (Goals(images[rows], goals[rows]) for rows in (order[:count], order[count:]))
    return Group(rest if len(rest.images) else first, first)


def smallest_changes(
    model: nn.Module, groups: Sequence[Group], settings: SearchSettings, random: torch.Generator
) -> list[SmallChange]:
    """The smallest change found for every group.

    Source: Rony et al., "Decoupling Direction and Norm" (CVPR 2019), with one direction for all
        images of a group.
    """
    searches = [_Search.begin(group, settings, random) for group in groups]
    for step in range(settings.steps):
        _step(model, searches, step)
    sizes = _sizes(model, [group.tested for group in groups], searches, settings)
    return [
        SmallChange(size * search.direction, size, rate, search.gradients.share)
        for search, (size, rate) in zip(searches, sizes, strict=True)
    ]


@dataclass
class _Search:
    """The search of one group: its change, the size that it is held to, the best so far."""

    settings: SearchSettings
    goals: Goals
    batches: EndlessBatches
    change: Tensor
    size: float
    best: tuple[Tensor, float] | None = None
    gradients: GradientCount = field(default_factory=GradientCount)

    @classmethod
    def begin(cls, group: Group, settings: SearchSettings, random: torch.Generator) -> _Search:
        goals = group.searched
        batches = batches_of(goals.images, settings.batch_size, random)
        none = settings.effect.none(goals.images[0])
        return cls(settings, goals, batches, none, settings.start)

    def batch(self) -> Goals:
        """The images of the next step, as they are."""
        rows = next(self.batches).to(self.goals.images.device)
        return Goals(self.goals.images[rows], self.goals.labels[rows])

    def move(self, gradient: Tensor, rate: float, step: int) -> None:
        """Along the gradient of the batch, then to a size that its success rate decides."""
        works = step > 0 and rate >= self.settings.floor
        if works and (self.best is None or self.size < self.best[1]):
            self.best = self.change, self.size
        left = 1 - step / self.settings.steps  # both lengths fall with the steps
        if self.best is None:
            grown = self.size * self.settings.growth if step > 0 else self.size
            self.size = min(self.settings.most, grown)
        else:
            self.size *= 1 - 0.1 * left if works else 1 + 0.1 * left
        length = (0.1 + 0.4 * left) * self.size
        self.change = self.size * unit(self.change - length * unit(gradient))

    @property
    def end(self) -> tuple[Tensor, float]:
        """The smallest change that worked on its batch, or the last one, and its size."""
        return self.best or (self.change, self.size)

    @property
    def direction(self) -> Tensor:
        """That of the end, of root mean square 1."""
        return unit(self.end[0])


def _step(model: nn.Module, searches: Sequence[_Search], step: int) -> None:
    """One step of all searches."""
    batches = [search.batch() for search in searches]
    counts = [len(batch.images) for batch in batches]
    effects = [search.settings.effect for search in searches]
    images = torch.cat(
        [e.on(b.images, s.change) for e, b, s in zip(effects, batches, searches, strict=True)]
    )
    labels = torch.cat([batch.labels for batch in batches])
    at_once = images_a_pass(images, images.device, most=len(images))
    parts = [
        _gradients(model, *part)
        for part in zip(images.split(at_once), labels.split(at_once), strict=True)
    ]
    every = (torch.cat(column).split(counts) for column in zip(*parts, strict=True))
    for search, effect, batch, gradients, there, lost in zip(
        searches, effects, batches, *every, strict=True
    ):
        hits = int(there.sum())
        search.gradients.add(len(there) - hits, int(lost.sum()))
        gradient = effect.gradient(batch.images, search.change, gradients)
        search.move(gradient, hits / len(there), step)


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the cross-entropies, which images are at their labels, which have none."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        # The second sum is there for models of thresholds, which depend on no pixel.
        loss = F.cross_entropy(logits, labels, reduction="sum") + 0 * images.sum()
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient, reached(logits, labels), vanished(gradient, logits, labels)


@torch.no_grad()
def _sizes(
    model: nn.Module,
    tested: Sequence[Goals],
    searches: Sequence[_Search],
    settings: SearchSettings,
) -> list[tuple[float, float]]:
    """The size of every group's change and its success rate, both on the tested images."""
    trials = [_least_size(search.end[1], settings.floor, settings.most) for search in searches]
    questions = {i: next(trial) for i, trial in enumerate(trials)}
    ends: dict[int, tuple[float, float]] = {}
    while questions:
        changes = {i: size * searches[i].direction for i, (size, _) in questions.items()}
        enough = {i: least for i, (_, least) in questions.items()}
        rates = _rates(model, [tested[i] for i in questions], changes, enough, settings)
        questions = {}
        for i, rate in rates.items():
            try:
                questions[i] = trials[i].send(rate)
            except StopIteration as stop:
                ends[i] = stop.value
    return [ends[i] for i in range(len(searches))]


def _least_size(
    size: float, floor: float, most: float
) -> Generator[tuple[float, float], float, tuple[float, float]]:
    """The least size that succeeds, between a fourth and four times this one, and its rate.

    Yields sizes to try, each with the rate that is enough, and is sent their rates. The widest, and
    its rate below the floor, if none does. Success need not grow with the size: a change that is
    too large may lead to a third label.
    """
    low, high, found = 0.0, 0.0, 0.0
    for factor in _FACTORS:
        low, high = high, min(most, factor * size)
        last = factor == _FACTORS[-1]  # its rate is reported, whatever it is
        found = yield high, 0.0 if last else floor
        if found >= floor:
            break
    else:
        return high, found
    low = max(low, high / 2)
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        tried = yield middle, floor
        if tried >= floor:
            high, found = middle, tried
        else:
            low = middle
    return high, found


def _rates(
    model: nn.Module,
    tested: Sequence[Goals],
    changes: dict[int, Tensor],
    enough: dict[int, float],
    settings: SearchSettings,
) -> dict[int, float]:
    """Success of changes; of the first images alone, where it cannot be enough any more."""
    goals = dict(zip(changes, tested, strict=True))
    hits, seen = dict.fromkeys(changes, 0), dict.fromkeys(changes, 0)
    open_ = list(changes)
    while open_:
        parts = {}
        for i in open_:
            images = goals[i].images
            at_once = images_a_pass(images, images.device, most=settings.batch_size)
            rows = slice(seen[i], seen[i] + at_once)
            changed = settings.effect.on(images[rows], changes[i])
            parts[i] = Goals(changed, goals[i].labels[rows])
        images = torch.cat([part.images for part in parts.values()])
        at_once = images_a_pass(images, images.device, most=len(images))
        answers = torch.cat([model(part).argmax(1) for part in images.split(at_once)])
        counts = [len(part.images) for part in parts.values()]
        for (i, part), own in zip(parts.items(), answers.split(counts), strict=True):
            hits[i] += int((own == part.labels).sum())
            seen[i] += len(own)
        open_ = [i for i in open_ if _undecided(hits[i], seen[i], len(goals[i].images), enough[i])]
    return {i: hits[i] / seen[i] for i in changes}


def _undecided(hits: int, seen: int, count: int, enough: float) -> bool:
    left = count - seen
    return left > 0 and (hits + left) / count >= enough


def unit(change: Tensor) -> Tensor:
    """A change whose root mean square is 1; zeros stay zeros."""
    return change / change.square().mean().sqrt().clamp(min=1e-12)
