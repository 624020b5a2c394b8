"""A race between labels: who can no longer become an outlier leaves, and costs nothing more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any


class Race:
    """Which labels go on from one milestone to the next, and what the scores of the others mean.

    An outlier lies far below the median. So two kinds of labels go on: the lowest, among which it
    would be, and some around the median, which tell how far the lowest have to go. Of the others,
    the highest leave, two in five of all that are still there at most: early in a search a target
    need not be the lowest yet.

    Scores fall with effort, so those of labels that left early cannot be compared with the final
    ones as they are: all lowest labels would stand out. `compare` brings them to equal effort with
    the factor by which the scores of the labels that went on have fallen since, the median one.

    A label without a score, because no generator of it has met the success floor yet, stays: it
    cannot be compared, and a target that is learned late must not be lost.

    Pure book-keeping, tested with scripts.

    Args:
        candidates: How many of the lowest always go on.
        references: How many others, those nearest to the median, always go on.

    Raises:
        ValueError: A number below 1.

    Source: ours; halving the field step by step is known as successive halving.
    """

    def __init__(self, *, candidates: int = 3, references: int = 2) -> None:
        if candidates < 1 or references < 1:
            raise ValueError(
                f"expected candidates and references >= 1, got {candidates}, {references}"
            )
        self._candidates, self._references = candidates, references
        self.left_at: dict[int, int] = {}
        self._then: dict[int, dict[int, float]] = {}  # milestone -> every label's score at it

    def __repr__(self) -> str:
        return f"Race(left_at={self.left_at})"

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs; an infinite score is written as None."""
        then = {
            step: {label: None if math.isinf(score) else score for label, score in scores.items()}
            for step, scores in self._then.items()
        }
        return {"left_at": dict(self.left_at), "then": then}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.left_at = dict(state["left_at"])
        self._then = {
            step: {label: math.inf if score is None else score for label, score in scores.items()}
            for step, scores in state["then"].items()
        }

    def decided(self, step: int) -> bool:
        """Whether the decision of this milestone is made."""
        return step in self._then

    def leave(self, scores: Mapping[int, float], step: int) -> tuple[int, ...]:
        """Decide at one milestone, and remember who left.

        Args:
            scores: Every label's score so far, as it stands for those that left; infinite for
                labels without one.
            step: The milestone.

        Returns:
            The labels that leave now, in order.

        Raises:
            ValueError: No scores, or one that is negative or not a number.
        """
        fair = self.compare(scores)
        order = sorted(fair, key=lambda label: (fair[label], label))
        place = {label: rank for rank, label in enumerate(order)}
        racing = [label for label in order if label not in self.left_at]
        scored = [label for label in racing if not math.isinf(fair[label])]
        middle = (sum(map(math.isfinite, fair.values())) - 1) / 2
        rest = scored[self._candidates :]
        near = sorted(rest, key=lambda label: (abs(place[label] - middle), place[label]))
        free = [label for label in rest if label not in near[: self._references]]
        most = 2 * len(racing) // 5
        leaving = tuple(sorted(free[max(0, len(free) - most) :]))
        self._then[step] = dict(scores)
        self.left_at.update(dict.fromkeys(leaving, step))
        return leaving

    def compare(self, scores: Mapping[int, float]) -> dict[int, float]:
        """Scores at equal effort: of labels that left, what they would have fallen to since.

        Args:
            scores: Every label's score, as it stands for those that left.

        Raises:
            ValueError: No scores, or one that is negative or not a number.
        """
        if not scores or not all(score >= 0 for score in scores.values()):
            raise ValueError(f"expected scores >= 0, got {dict(scores)}")
        factors: dict[int, float] = {}
        for step, then in self._then.items():
            fallen = [
                scores[label] / then[label]
                for label in scores
                if label not in self.left_at and 0 < then[label] < math.inf
            ]
            factors[step] = min(1.0, statistics.median(fallen)) if fallen else 1.0
        return {
            label: score * factors[self.left_at[label]] if label in self.left_at else score
            for label, score in scores.items()
        }
