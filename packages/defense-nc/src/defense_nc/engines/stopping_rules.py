"""Which labels and starts of Neural Cleanse are searched further at a milestone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from functools import partial

from defense_nc.config import NCConfig
from defense_nc.engines.search_rows import Search
from defense_nc.label_halving import LabelHalving, Milestone, Scores, Selection


def nc_halving(config: NCConfig) -> LabelHalving:
    """The labels with the smallest masks go on, since only a small score is ever suspected.

    How many is fixed, whatever the number of labels. So do a few labels around the median, the
    control labels, and before the last milestone those that no trigger has reached yet. If even the
    smallest mask is nearly as large as the median at the last milestone, all stop.
    """
    return LabelHalving(partial(_select, config), _gain)


def stopping_starts(searches: Sequence[Search], *, last: bool) -> list[Search]:
    """One label's searches that stop: the worse half, or all but the best at the last milestone.

    Of those that have not succeeded yet, the one that comes nearer to it is the better one.
    """
    ranked = sorted(searches, key=lambda one: (one.norm, -one.success, one.start))
    return ranked[1 if last else math.ceil(len(ranked) / 2) :]


def _select(config: NCConfig, scores: Scores, searched: frozenset[int], step: int) -> Selection:
    milestones = config.milestones
    last = step == milestones[-1]
    candidates = config.candidates * 2 ** (len(milestones) - 1 - milestones.index(step))
    reached = sorted(
        (label for label in searched if scores[label] < math.inf),
        key=lambda label: (scores[label], label),
    )
    finite = [score for score in scores.values() if score < math.inf]
    middle = statistics.median(finite) if finite else math.inf
    near = sorted(reached, key=lambda label: (abs(scores[label] - middle), label))
    controls = tuple(near[: config.references])
    lowest = min(scores.values())
    if last and lowest < math.inf and lowest > config.calm * middle:
        return Selection(frozenset(), controls)
    waiting = frozenset() if last else searched.difference(reached)
    return Selection(frozenset({*reached[:candidates], *controls, *waiting}), controls)


def _gain(milestones: Sequence[Milestone], scores: Scores, searched: frozenset[int]) -> list[float]:
    """From one milestone to the next, the geometric mean over its control labels."""
    gains: list[float] = []
    for before, after in itertools.pairwise([*(m.scores for m in milestones), scores]):
        controls = milestones[len(gains)].control_labels
        logs = [
            math.log(after[label] / before[label])
            for label in controls
            if 0 < before[label] < math.inf and 0 < after[label] < math.inf
        ]
        gains.append(math.exp(statistics.fmean(logs)) if logs else 1.0)
    return gains
