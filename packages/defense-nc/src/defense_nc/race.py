"""The race between labels: who need not go on, so that the work shrinks while a scan runs.

At a few milestones every label has taken the same number of steps, and its smallest mask so far is
compared with the others'. Pure book-keeping: norms in, decisions out.

- Of a label's searches the better half goes on, the smallest mask first; the last milestone leaves
  one.
- The labels with the smallest masks go on, since only a small score is ever suspected. How many is
  fixed, whatever the number of labels: with a thousand labels as few as with ten.
- So do a few labels around the median. They show how much a mask of the bulk still shrinks with
  more steps, and a small mask is judged by its share of the median at the same effort.
- A label that has not been reached yet has no mask to compare; it leaves at the last milestone.
- If even the smallest mask is nearly as large as the median at the last milestone, all stop.

The mask of a label that left is an upper bound: with more steps it would have shrunk. Its score is
therefore brought to the effort of those that went on: multiplied by what the labels around the
median gained since. So its place beside the bulk, for which it left, stays what it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from defense_nc.schedule import NCConfig


class Standing(NamedTuple):
    """One search at a milestone."""

    label: int
    start: int
    norm: float  # of its smallest mask that succeeded; infinite if none has
    success: float  # of its last step, in [0, 1]


class Race:
    """Decide at every milestone which searches leave, and keep all labels at equal effort.

    Args:
        config: ``milestones``, ``candidates``, ``references`` and ``calm`` are used.

    Source: successive halving (Jamieson and Talwalkar 2016), here over starts and over labels; the
        references are ours.
    """

    def __init__(self, config: NCConfig) -> None:
        self._config = config
        self.norms: dict[int, float] = {}  # of every label, at the effort of those still racing
        self.gains: dict[int, float] = {}  # of labels that left: what the bulk gained since
        self.left_at: dict[int, int] = {}  # the step after which a label left
        self.stopped_at: int | None = None  # the step at which nothing stood out
        self.references: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Race(left={len(self.left_at)}, stopped_at={self.stopped_at})"

    def cull(self, step: int, standings: Sequence[Standing]) -> set[tuple[int, int]]:
        """Decide who leaves after this step.

        Args:
            step: A milestone: every search has taken so many steps, or has stopped by itself.
            standings: The searches that are still in the race.

        Returns:
            The ``(label, start)`` of those that leave.

        Raises:
            ValueError: A step that is no milestone, or nobody in the race.
        """
        milestones = self._config.milestones
        if step not in milestones or not standings:
            raise ValueError(
                f"expected a step of {milestones} and searches, got {step} and {len(standings)}"
            )
        racing = self.finish(standings)
        last = step == milestones[-1]
        candidates = self._config.candidates * 2 ** (len(milestones) - 1 - milestones.index(step))
        stay = self._labels(racing, candidates, last=last)
        if last and self._calm():
            self.stopped_at, stay = step, set()
        for label in sorted(racing - stay):
            self.left_at[label], self.gains[label] = step, 1.0
        return {
            (one.label, one.start)
            for label in racing
            for one in _slower([s for s in standings if s.label == label], last=last)
        } | {(one.label, one.start) for one in standings if one.label not in stay}

    def finish(self, standings: Sequence[Standing]) -> set[int]:
        """Take in where the labels in the race have come, and bring the others to this effort.

        Returns:
            The labels in the race.
        """
        before = {label: self.norms[label] for label in self.references}
        now: dict[int, float] = {}
        for one in standings:
            now[one.label] = min(one.norm, now.get(one.label, math.inf))
        self.norms.update(now)
        logs = [
            math.log(self.norms[label] / norm)
            for label, norm in before.items()
            if 0 < norm < math.inf and 0 < self.norms[label] < math.inf
        ]
        gain = math.exp(statistics.fmean(logs)) if logs else 1.0
        for label in self.left_at:
            self.gains[label] *= gain
            self.norms[label] *= gain
        return set(now)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, ready for JSON; an infinite norm is written as None."""
        pairs = {name: list(getattr(self, name).items()) for name in ("gains", "left_at")}
        norms = [[k, None if v == math.inf else v] for k, v in self.norms.items()]
        return {
            **pairs,
            "norms": norms,
            "stopped_at": self.stopped_at,
            "references": list(self.references),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another race's state."""
        self.norms = {k: math.inf if v is None else v for k, v in state["norms"]}
        self.gains, self.left_at = dict(state["gains"]), dict(state["left_at"])
        self.stopped_at, self.references = state["stopped_at"], tuple(state["references"])

    def _labels(self, racing: set[int], candidates: int, *, last: bool) -> set[int]:
        """The labels that go on: the smallest, some around the median, those not reached yet."""
        reached = sorted(
            (label for label in racing if self.norms[label] < math.inf),
            key=lambda label: (self.norms[label], label),
        )
        middle = self._median()
        near = sorted(reached, key=lambda label: (abs(self.norms[label] - middle), label))
        self.references = tuple(near[: self._config.references])
        waiting = set() if last else racing.difference(reached)
        return {*reached[:candidates], *self.references, *waiting}

    def _median(self) -> float:
        """Of all labels that have been reached, those that left included."""
        found = [norm for norm in self.norms.values() if norm < math.inf]
        return statistics.median(found) if found else math.inf

    def _calm(self) -> bool:
        lowest, middle = min(self.norms.values()), self._median()
        return lowest < math.inf and lowest > self._config.calm * middle


def _slower(searches: Sequence[Standing], *, last: bool) -> list[Standing]:
    """One label's searches that leave: the worse half, or all but the best at the last milestone.

    Of those that have not succeeded yet, the one that comes nearer to it is the better one.
    """
    ranked = sorted(searches, key=lambda one: (one.norm, -one.success, one.start))
    return ranked[1 if last else math.ceil(len(ranked) / 2) :]
