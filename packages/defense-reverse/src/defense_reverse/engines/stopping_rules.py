"""Which labels are searched further at a milestone, and how much the others would have fallen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial

from defense_nc.label_halving import LabelHalving, Milestone, Scores, Selection
from defense_reverse.config import ReverseConfig


def generator_halving(config: ReverseConfig) -> LabelHalving:
    """The lowest labels go on, and as control labels some around the median.

    An outlier lies far below the median, so it would be among the lowest. Of the others, the
    highest stop, two in five of all that are still searched at most: early in a search a target
    need not be the lowest yet. A label without a score, because no generator of it has met the
    success floor yet, goes on: a target that is learned late must not be lost.
    """
    return LabelHalving(partial(_select, config), _gain)


def _select(
    config: ReverseConfig, scores: Scores, searched: frozenset[int], step: int
) -> Selection:
    order = sorted(scores, key=lambda label: (scores[label], label))
    rank = {label: place for place, label in enumerate(order)}
    scored = [label for label in order if label in searched and not math.isinf(scores[label])]
    middle = (sum(map(math.isfinite, scores.values())) - 1) / 2
    rest = scored[config.candidates :]
    near = sorted(rest, key=lambda label: (abs(rank[label] - middle), rank[label]))
    controls = tuple(near[: config.references])
    free = [label for label in rest if label not in controls]
    most = 2 * len(searched) // 5
    return Selection(searched.difference(free[max(0, len(free) - most) :]), controls)


def _gain(milestones: Sequence[Milestone], scores: Scores, searched: frozenset[int]) -> list[float]:
    """The median factor by which the labels that went on have fallen since, at most 1."""
    before = milestones[0].scores
    factors = [
        score / before[label]
        for label, score in scores.items()
        if label in searched and 0 < before[label] < math.inf
    ]
    return [min(1.0, statistics.median(factors)) if factors else 1.0]
