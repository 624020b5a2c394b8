"""Successive halving over labels: labels that cannot be outliers stop early.

At milestones all labels have been searched equally long, and their scores are compared. Scores fall
with further effort: `LabelHalving.compare` multiplies that of a stopped label by what the others
gained since. Which labels go on and how a gain is measured are the rules of a detector.

Source: successive halving (Jamieson and Talwalkar 2016); control labels and gains are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Scores = Mapping[int, float]  # by label, >= 0; infinite where no trigger reached the label yet


class Selection(NamedTuple):
    """The labels that are searched further."""

    stay: frozenset[int]
    control_labels: tuple[int, ...] = ()  # those among them that show how much scores still fall


class Milestone(NamedTuple):
    """What was known at one milestone."""

    step: int
    scores: dict[int, float]  # of every label
    control_labels: tuple[int, ...]


# (scores at equal effort, labels still searched, step) -> who goes on
Select = Callable[[Scores, frozenset[int], int], Selection]
# (milestones since a label stopped, scores now, labels still searched) -> factors on its score
Gain = Callable[[Sequence[Milestone], Scores, frozenset[int]], Sequence[float]]


class LabelHalving:
    """Which labels stopped when, and every label's score at equal effort."""

    def __init__(self, select: Select, gain: Gain) -> None:
        self._select, self._gain = select, gain
        self.stopped_at: dict[int, int] = {}  # label -> milestone
        self.milestones: list[Milestone] = []

    @property
    def control_labels(self) -> tuple[int, ...]:
        """Those of the last milestone."""
        return self.milestones[-1].control_labels if self.milestones else ()

    def decided(self, step: int) -> bool:
        """Whether this milestone is behind."""
        return any(milestone.step == step for milestone in self.milestones)

    def stop(self, step: int, scores: Scores) -> tuple[int, ...]:
        """Decide which labels stop at a milestone; scores of stopped ones are as they were."""
        fair, searched = self.compare(scores), self._searched(scores)
        selection = self._select(fair, searched, step)
        stopping = tuple(sorted(searched - selection.stay))
        self.milestones.append(Milestone(step, dict(scores), selection.control_labels))
        self.stopped_at.update(dict.fromkeys(stopping, step))
        return stopping

    def compare(self, scores: Scores) -> dict[int, float]:
        """Scores at equal effort: of stopped labels, what they would have fallen to since.

        Raises:
            ValueError: No scores, or one that is negative or not a number.
        """
        if not scores or not all(score >= 0 for score in scores.values()):
            raise ValueError(f"expected scores >= 0, got {dict(scores)}")
        factors = self._factors(scores)
        return {
            label: math.prod(factors.get(label, ()), start=score) for label, score in scores.items()
        }

    def gains(self, scores: Scores) -> dict[int, float]:
        """The factor on each stopped label's score."""
        return {label: math.prod(each) for label, each in self._factors(scores).items()}

    def state_dict(self) -> dict[str, Any]:
        """All that changes, ready for JSON; an infinite score is written as None."""
        milestones = [
            [step, [[k, None if v == math.inf else v] for k, v in scores.items()], list(controls)]
            for step, scores, controls in self.milestones
        ]
        return {"stopped_at": list(self.stopped_at.items()), "milestones": milestones}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.stopped_at = dict(state["stopped_at"])
        self.milestones = [
            Milestone(step, {k: math.inf if v is None else v for k, v in scores}, tuple(controls))
            for step, scores, controls in state["milestones"]
        ]

    def _searched(self, scores: Scores) -> frozenset[int]:
        return frozenset(scores).difference(self.stopped_at)

    def _factors(self, scores: Scores) -> dict[int, Sequence[float]]:
        searched, since = self._searched(scores), {}
        for index, milestone in enumerate(self.milestones):
            since[milestone.step] = self._gain(self.milestones[index:], scores, searched)
        return {label: since[step] for label, step in self.stopped_at.items()}
