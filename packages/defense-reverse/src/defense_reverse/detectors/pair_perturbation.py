"""Pair perturbations: is one class near another, or every class near a partner, without a reason?

A trigger that works on one class only, or that sends every class to another one (all-to-all), has
no picture that sends images of all classes to one label. So the smallest picture is sought for each
ordered pair of classes. Some classes are near to each other by nature: what counts is how much
smaller a pair's picture is than those of its source, of its goal, and of the way back. And one
picture that sends each class to a partner of its own exists in an all-to-all backdoor alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import Finding, ScanReport, judge_scan
from defense_reverse.detectors.common import check_settings, rows_by_label
from defense_reverse.detectors.picture_search import (
    Group,
    SearchSettings,
    SmallPicture,
    smallest_pictures,
    split_group,
    unit,
)
from defense_reverse.detectors.universal_perturbation import UniversalPicture
from wm_inject.core.presets import preset_of
from wm_victim.inference import predict

MIN_CLASSES = 4  # with images: of fewer, rows and columns cannot be told from their cells
_FEWEST = 2  # images of a class: one to search with, one to measure on
_FITS = 30
_RESOLUTION = 0.05  # of log sizes: a picture's size is searched to 5 %
_NEVER = 1e6  # cost of a pair that was not searched
_MAP_GROWTH = 1.05  # of the map's picture in a step: slow, since its direction takes steps to find


class Pairs(NamedTuple):
    """The pictures of all pairs of classes."""

    sizes: Tensor  # float64 (K, K), source by goal, in units of [0, 1]; NaN where not searched
    rates: Tensor  # float64 (K, K): success on images that were not searched with
    pictures: Mapping[tuple[int, int], Tensor]
    starved: tuple[float, ...]  # by goal: as `ScanReport.starved`


class ClassMap(NamedTuple):
    """One picture that sends classes to partners of their own."""

    goals: dict[int, int]  # by class; every goal once
    picture: SmallPicture
    works: bool  # on enough images, at no more than the size of the middle pair


@dataclass(frozen=True)
class PairPerturbation:
    """Universal perturbations of pairs of classes as a `defense_nc.Detector`.

    Args:
        steps: Of each search.
        batch_size: Images of each source in a step.
        tested: Images of each source that success is measured on; at most half of those at hand.
        start: As for `UniversalPerturbation`, and so are ``floor``, ``alpha`` and ``max_ratio``.
        rounds: Searches for the partners of the classes, each from the answers to the last picture.
        map_steps: Of the search for one picture for all classes.
        map_batch_size: Its images in a step.
        map_tested: Images of all classes that it is measured on; at most half of those at hand.
        map_floor: Success rate, in (0, 1], that makes a map a finding.

    Source: a perturbation for each pair of classes is that of Xiang, Miller and Kesidis, "Detection
        of Backdoors in Trained Classifiers Without Access to the Training Set" (IEEE TNNLS 2022);
        the comparison with the way back and the map of classes are ours.
    """

    name: ClassVar[str] = "pairs"
    steps: int = 25
    batch_size: int = 12
    tested: int = 20
    start: float = 2 / 255
    floor: float = 0.8
    rounds: int = 4
    map_steps: int = 50
    map_batch_size: int = 64
    map_tested: int = 200
    map_floor: float = 0.5
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        counts = "steps batch_size tested rounds map_steps map_batch_size map_tested"
        check_settings(self, counts.split(), ("start",))
        for name in ("floor", "map_floor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> PairPerturbation:
        """Settings by name, with changes; "paper" has enough steps to converge, "fast" is ours."""
        return preset_of(cls, PRESETS, name, **changes)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the search, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Find every pair's picture and the map of classes, and decide whether one has no reason.

        A ``checkpoint`` holds the goals that are done, as for `UniversalPerturbation`.

        Returns:
            A report with a score for every goal: that of the source which is unusually near, in
            `LabelScore.source`. It is 1 where the pair is as near as its classes and the way back
            let expect, and small where it is nearer. A map that works is a finding, whatever the
            scores are. ``log["raw"]`` has the sizes and the map.

        Raises:
            ValueError: As `Detector.scan`, or fewer than four classes with two images each.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            if why := too_few_classes(inputs.labels):
                raise ValueError(f"expected images to search pairs with: {why}")
            pairs = self.search(inputs, seed=seed, progress=progress, checkpoint=checkpoint)
            class_map = self.search_map(inputs, pairs, seed=seed)
        scores, pictures, finding = pair_scores(pairs.sizes), dict(pairs.pictures), None
        sources = nearest_sources(pairs, scores, self.floor)
        if class_map.works:
            sources |= {goal: source for source, goal in class_map.goals.items()}
            pictures |= dict.fromkeys(class_map.goals.items(), class_map.picture.picture)
            finding = Finding(tuple(sorted(class_map.goals.values())), _map_reason(class_map))
        rows, goals = [*sources.values()], [*sources]
        label_scores = torch.ones(inputs.num_classes, dtype=torch.float64)
        label_rates = torch.zeros_like(label_scores)
        label_scores[goals], label_rates[goals] = scores[rows, goals], pairs.rates[rows, goals]
        report = judge_scan(
            self.name,
            label_scores,
            label_rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=self.floor,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={
                goal: UniversalPicture(pictures[source, goal]) for goal, source in sources.items()
            },
            seed=seed,
            starved=pairs.starved,
            notes=inputs.notes,
            sources=[sources.get(goal) for goal in range(inputs.num_classes)],
            finding=finding,
        )
        return replace(report, log={"raw": _raw(pairs, class_map)})

    def search(
        self,
        inputs: ScanInputs,
        *,
        seed: int,
        progress: bool = False,
        checkpoint: Path | None = None,
    ) -> Pairs:
        """The smallest picture found for every ordered pair of classes with enough images."""
        settings = SearchSettings(self.steps, self.batch_size, self.start, self.floor)
        classes = classes_with_images(inputs.labels)

        def column(goal: int, random: torch.Generator) -> list[list[Any]]:
            sources = [source for source in classes if source != goal]
            groups = [self._group(inputs, source, goal, random) for source in sources]
            pictures = smallest_pictures(inputs.model, groups, settings, random)
            return [[source, *one.stored()] for source, one in zip(sources, pictures, strict=True)]

        rows = rows_by_label(
            inputs,
            column,
            kind=self.name,
            settings=self.settings,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        return _pairs(rows, inputs.images.device)

    def search_map(self, inputs: ScanInputs, pairs: Pairs, *, seed: int) -> ClassMap:
        """The picture that sends each class to a partner, and the partners.

        They begin as those whose pairs are nearest for their classes, all in all. Where some are
        right, their picture shows the others: the partners become the labels that it moves the
        classes' images to, until nothing changes.
        """
        random = torch.Generator().manual_seed(seed)
        middle = float(pairs.sizes.nanmedian())
        goals = partners(excess(pairs.sizes).nan_to_num(_NEVER))
        trial = SearchSettings(self.steps, self.map_batch_size, middle / 2, self.floor, growth=1.0)
        for _ in range(self.rounds):
            group = self._map_group(inputs, goals, random)
            direction = unit(smallest_pictures(inputs.model, [group], trial, random)[0].picture)
            answers = answers_by_class(inputs, middle / 2 * direction)
            before, goals = goals, partners(torch.where(pairs.sizes.isnan(), _NEVER, -answers))
            if goals == before:
                break
        group = self._map_group(inputs, goals, random)
        last = trial._replace(steps=self.map_steps, floor=self.map_floor, growth=_MAP_GROWTH)
        picture = smallest_pictures(inputs.model, [group], last, random)[0]
        works = picture.rate >= self.map_floor and picture.size <= middle
        return ClassMap(goals, picture, works)

    def _group(self, inputs: ScanInputs, source: int, goal: int, random: torch.Generator) -> Group:
        own = inputs.images[inputs.labels == source]
        goals = torch.full((len(own),), goal, device=own.device)
        return split_group(own, goals, self.tested, random)

    def _map_group(
        self, inputs: ScanInputs, goals: Mapping[int, int], random: torch.Generator
    ) -> Group:
        of_class = torch.full((inputs.num_classes,), -1)
        of_class[list(goals)] = torch.tensor(list(goals.values()))
        labels = of_class.to(inputs.labels.device)[inputs.labels]
        rows = labels >= 0
        return split_group(inputs.images[rows], labels[rows], self.map_tested, random)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"steps": 200, "batch_size": 24, "tested": 50, "floor": 0.9, "map_steps": 200},
}


def classes_with_images(labels: Tensor) -> list[int]:
    """The classes that pictures are sought for."""
    values, counts = labels.unique(return_counts=True)
    return values[counts >= _FEWEST].tolist()


def too_few_classes(labels: Tensor) -> str | None:
    """Why pairs of these images' classes cannot be compared, or None."""
    count = len(classes_with_images(labels))
    if count >= MIN_CLASSES:
        return None
    return f"pairs take {MIN_CLASSES} classes with {_FEWEST} images each, there are {count}"


def excess(sizes: Tensor) -> Tensor:
    """How far pairs' log sizes are from what their classes let expect, ``(K, K)``.

    What is expected is a sum of a number for the source and one for the goal, at the least sum of
    absolute distances: by least squares, weighted anew, with distances below `_RESOLUTION` squared.

    Args:
        sizes: Float64 ``(K, K)``, source by goal, > 0; NaN for pairs that are not there, in the
            result too.
    """
    logs = sizes.log()
    present = ~logs.isnan()
    sources, goals = present.nonzero(as_tuple=True)
    count, values = len(sizes), logs[present]
    design = torch.zeros(len(values), 2 * count, dtype=values.dtype)
    design[torch.arange(len(values)), sources] = 1
    design[torch.arange(len(values)), count + goals] = 1
    weights = torch.ones_like(values)
    for _ in range(_FITS):
        root = weights.sqrt()[:, None]
        levels = torch.linalg.lstsq(root * design, root * values[:, None], driver="gelsd").solution
        rest = values - (design @ levels)[:, 0]
        weights = (rest.square() + _RESOLUTION**2).rsqrt()
    logs[present] = rest
    return logs


def pair_scores(sizes: Tensor) -> Tensor:
    """How near pairs are, for their classes and for the way back: 1 as expected, ``(K, K)``.

    Classes that are alike are near in both directions: of a pair whose way back is nearer than
    expected too, only the difference counts.
    """
    rest = excess(sizes)
    back = torch.where(rest.T.isnan(), 0.0, rest.T.clamp(max=0))
    return (rest - back).exp()


def nearest_sources(pairs: Pairs, scores: Tensor, floor: float) -> dict[int, int]:
    """By goal, the source with the lowest score of those that reached it.

    Where none did, the one that came nearest to. A goal without any source is not there.
    """
    rates = pairs.rates.nan_to_num(-1.0)
    reached = rates >= floor - 1e-6
    lowest = torch.where(reached, scores, _NEVER).argmin(0)
    sources = torch.where(reached.any(0), lowest, rates.argmax(0))
    return {
        goal: int(sources[goal]) for goal in range(len(rates)) if float(rates[:, goal].max()) >= 0
    }


def partners(costs: Tensor) -> dict[int, int]:
    """The goal of each class, every goal once, at the least cost in all; none at `_NEVER`."""
    sources, goals = linear_sum_assignment(costs.numpy())
    pairs = zip(sources.tolist(), goals.tolist(), strict=True)
    return {source: goal for source, goal in pairs if float(costs[source, goal]) < _NEVER}


def answers_by_class(inputs: ScanInputs, picture: Tensor) -> Tensor:
    """Mean probabilities of the labels for each class's images with the picture, ``(K, K)``."""
    images = (inputs.images + picture).clamp(0, 1)
    probabilities = predict(inputs.model, images).softmax(1).double().cpu()
    total = torch.zeros(inputs.num_classes, inputs.num_classes, dtype=torch.float64)
    labels = inputs.labels.cpu()
    total.index_add_(0, labels, probabilities)
    return total / labels.bincount(minlength=len(total)).clamp(min=1)[:, None]


def _pairs(rows: Sequence[Sequence[Sequence[Any]]], device: torch.device) -> Pairs:
    count = len(rows)
    sizes = torch.full((count, count), torch.nan, dtype=torch.float64)
    rates, pictures = sizes.clone(), {}
    for goal, column in enumerate(rows):
        for source, picture, size, rate, _ in column:
            sizes[source, goal], rates[source, goal] = size, rate
            pictures[source, goal] = picture.to(device)
    starved = tuple(fmean(one[-1] for one in column) if column else 0.0 for column in rows)
    return Pairs(sizes, rates, pictures, starved)


def _map_reason(class_map: ClassMap) -> str:
    shown = [f"{source} to {goal}" for source, goal in sorted(class_map.goals.items())]
    pairs = ", ".join(shown[:6]) + (" and so on" if len(shown) > 6 else "")
    return (
        f"One added picture of {255 * class_map.picture.size:.1f}/255 (root mean square) sends "
        f"{class_map.picture.rate:.0%} of unseen images each to the partner of its class ({pairs})."
    )


def _raw(pairs: Pairs, class_map: ClassMap) -> dict[str, Any]:
    """Everything but the pictures, ready for JSON; None for a pair that was not searched."""
    sizes = [[None if x != x else x for x in row] for row in pairs.sizes.tolist()]
    goals = [[source, goal] for source, goal in sorted(class_map.goals.items())]
    picture = class_map.picture
    return {
        "sizes": sizes,
        "map": {
            "goals": goals,
            "size": picture.size,
            "rate": picture.rate,
            "works": class_map.works,
        },
    }
