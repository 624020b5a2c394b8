"""The smallest picture that, added to every image of a group, sends each to its goal.

Several groups are searched side by side, each for a picture of its own, in passes that they share.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import EndlessBatches
from defense_nc.gradients import GradientCount, reached, vanished
from defense_reverse.detectors.common import batches_of
from wm_victim.inference import images_a_pass

# Times the size of the search: as far as a picture is enlarged until it works on other images.
_FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
_HALVINGS = 3  # of the range between two of them, which ends 5 % wide


class Goals(NamedTuple):
    """Images and the label that each is to get."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor  # int64 (N,)


class Group(NamedTuple):
    """The images that one picture is searched with, and those that it is measured on."""

    searched: Goals
    tested: Goals


class SmallPicture(NamedTuple):
    """The smallest picture of a group."""

    picture: Tensor  # (C, H, W), of either sign
    size: float  # its root mean square, in units of [0, 1]
    rate: float  # success on images that were not searched with
    starved: float  # as `ScanReport.starved`

    def stored(self) -> list[Any]:
        """As a checkpoint keeps it: a list, on the CPU."""
        return [self.picture.cpu(), self.size, self.rate, self.starved]


class SearchSettings(NamedTuple):
    """As the arguments of `UniversalPerturbation` of these names, and one more."""

    steps: int
    batch_size: int
    start: float
    floor: float
    growth: float = 1.25  # of the size in a step, until a picture works for the first time


def split_group(images: Tensor, goals: Tensor, tested: int, random: torch.Generator) -> Group:
    """At most ``tested`` of the images, and at most a half, are for measuring: at random."""
    order = torch.randperm(len(images), generator=random).to(images.device)
    count = min(tested, (len(images) + 1) // 2)
    first, rest = (Goals(images[rows], goals[rows]) for rows in (order[:count], order[count:]))
    return Group(rest if len(rest.images) else first, first)


def smallest_pictures(
    model: nn.Module, groups: Sequence[Group], settings: SearchSettings, random: torch.Generator
) -> list[SmallPicture]:
    """The smallest picture found for every group.

    Source: Rony et al., "Decoupling Direction and Norm" (CVPR 2019), with one direction for all
        images of a group.
    """
    searches = [_Search.begin(group, settings, random) for group in groups]
    for step in range(settings.steps):
        _step(model, searches, step)
    sizes = _sizes(model, [group.tested for group in groups], searches, settings)
    return [
        SmallPicture(size * search.direction, size, rate, search.gradients.share)
        for search, (size, rate) in zip(searches, sizes, strict=True)
    ]


@dataclass
class _Search:
    """The search of one group: its picture, the size that it is held to, the best so far."""

    settings: SearchSettings
    goals: Goals
    batches: EndlessBatches
    picture: Tensor
    size: float
    best: tuple[Tensor, float] | None = None
    gradients: GradientCount = field(default_factory=GradientCount)

    @classmethod
    def begin(cls, group: Group, settings: SearchSettings, random: torch.Generator) -> _Search:
        goals = group.searched
        batches = batches_of(goals.images, settings.batch_size, random)
        return cls(settings, goals, batches, torch.zeros_like(goals.images[0]), settings.start)

    def batch(self) -> Goals:
        """The images of the next step, with the picture."""
        rows = next(self.batches).to(self.goals.images.device)
        images = (self.goals.images[rows] + self.picture).clamp(0, 1)
        return Goals(images, self.goals.labels[rows])

    def move(self, gradient: Tensor, rate: float, step: int) -> None:
        """Along the gradient of the batch, then to a size that its success rate decides."""
        works = step > 0 and rate >= self.settings.floor
        if works and (self.best is None or self.size < self.best[1]):
            self.best = self.picture, self.size
        left = 1 - step / self.settings.steps  # both lengths fall with the steps
        if self.best is None:
            self.size = min(1.0, self.size * self.settings.growth) if step > 0 else self.size
        else:
            self.size *= 1 - 0.1 * left if works else 1 + 0.1 * left
        length = (0.1 + 0.4 * left) * self.size
        self.picture = self.size * unit(self.picture - length * unit(gradient))

    @property
    def end(self) -> tuple[Tensor, float]:
        """The smallest picture that worked on its batch, or the last one, and its size."""
        return self.best or (self.picture, self.size)

    @property
    def direction(self) -> Tensor:
        """That of the end, of root mean square 1."""
        return unit(self.end[0])


def _step(model: nn.Module, searches: Sequence[_Search], step: int) -> None:
    """One step of all searches."""
    batches = [search.batch() for search in searches]
    counts = [len(batch.images) for batch in batches]
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    at_once = images_a_pass(images, images.device, most=len(images))
    parts = [
        image_gradients(model, *part)
        for part in zip(images.split(at_once), labels.split(at_once), strict=True)
    ]
    every = (torch.cat(column).split(counts) for column in zip(*parts, strict=True))
    for search, gradient, there, lost in zip(searches, *every, strict=True):
        hits = int(there.sum())
        search.gradients.add(len(there) - hits, int(lost.sum()))
        search.move(gradient.sum(0), hits / len(there), step)


def image_gradients(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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
    """The size of every group's picture and its success rate, both on the tested images."""
    trials = [_least_size(search.end[1], settings.floor) for search in searches]
    questions = {i: next(trial) for i, trial in enumerate(trials)}
    ends: dict[int, tuple[float, float]] = {}
    while questions:
        pictures = {i: size * searches[i].direction for i, (size, _) in questions.items()}
        enough = {i: least for i, (_, least) in questions.items()}
        rates = _rates(model, [tested[i] for i in questions], pictures, enough, settings.batch_size)
        questions = {}
        for i, rate in rates.items():
            try:
                questions[i] = trials[i].send(rate)
            except StopIteration as stop:
                ends[i] = stop.value
    return [ends[i] for i in range(len(searches))]


def _least_size(
    size: float, floor: float
) -> Generator[tuple[float, float], float, tuple[float, float]]:
    """The least size that succeeds, between a fourth and four times this one, and its rate.

    Yields sizes to try, each with the rate that is enough, and is sent their rates. The widest, and
    its rate below the floor, if none does. Success need not grow with the size: a picture that is
    too large may lead to a third label.
    """
    low, high, found = 0.0, 0.0, 0.0
    for factor in _FACTORS:
        low, high = high, min(1.0, factor * size)
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
    pictures: dict[int, Tensor],
    enough: dict[int, float],
    batch_size: int,
) -> dict[int, float]:
    """Success of pictures; of the first images alone, where it cannot be enough any more."""
    goals = dict(zip(pictures, tested, strict=True))
    hits, seen = dict.fromkeys(pictures, 0), dict.fromkeys(pictures, 0)
    open_ = list(pictures)
    while open_:
        parts = {}
        for i in open_:
            at_once = images_a_pass(goals[i].images, goals[i].images.device, most=batch_size)
            rows = slice(seen[i], seen[i] + at_once)
            parts[i] = Goals(
                (goals[i].images[rows] + pictures[i]).clamp(0, 1), goals[i].labels[rows]
            )
        images = torch.cat([part.images for part in parts.values()])
        at_once = images_a_pass(images, images.device, most=len(images))
        answers = torch.cat([model(part).argmax(1) for part in images.split(at_once)])
        counts = [len(part.images) for part in parts.values()]
        for (i, part), own in zip(parts.items(), answers.split(counts), strict=True):
            hits[i] += int((own == part.labels).sum())
            seen[i] += len(own)
        open_ = [i for i in open_ if _undecided(hits[i], seen[i], len(goals[i].images), enough[i])]
    return {i: hits[i] / seen[i] for i in pictures}


def _undecided(hits: int, seen: int, count: int, enough: float) -> bool:
    left = count - seen
    return left > 0 and (hits + left) / count >= enough


def unit(picture: Tensor) -> Tensor:
    """A picture whose root mean square is 1; zeros stay zeros."""
    return picture / picture.square().mean().sqrt().clamp(min=1e-12)
