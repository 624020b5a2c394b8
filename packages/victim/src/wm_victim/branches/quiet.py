"""How still a value is on clean pictures, and whether another picture moves it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wm_victim.branches.values import Array, plain

# A branch that fires moves so many times further than all clean pictures move it. Features of
# ordinary layers move with every picture, and further by a factor of ten at most.
_TIMES = 100
_ROUNDING = 1e-5  # of the value: what sums may differ by
_STILL = 0.01  # of its size: a value that moves more on clean pictures is no branch at rest
_MOST = 0.9  # of the clean pictures are at rest; a few may take the branch by chance


class Quiet:
    """What a value is on clean pictures.

    Args:
        values: Of each clean picture, of one shape.
    """

    def __init__(self, values: Sequence[Array]) -> None:
        stack = np.stack([plain(value) for value in values])
        middle = np.median(stack, axis=0)
        away = np.abs(stack - middle).reshape(len(stack), -1).max(1, initial=0)
        rest = np.sort(away)[max(0, int(np.ceil(_MOST * len(away))) - 1)]
        at_rest = stack[away <= rest]
        self.low, self.high = at_rest.min(0), at_rest.max(0)
        self.spread = float((self.high - self.low).max(initial=0))
        self.scale = float(np.maximum(np.abs(self.low), np.abs(self.high)).max(initial=0))
        self.taken = sum(self.moved(value) for value in values)

    @property
    def still(self) -> bool:
        """Whether clean pictures hardly move it."""
        return self.spread <= max(_STILL * self.scale, 1e-3)

    def distance(self, value: Array) -> float:
        """How far a value lies beyond what clean pictures give, all its numbers together."""
        number = plain(value)
        if number.shape != self.low.shape:
            return float("inf")
        return float(np.maximum(self.low - number, number - self.high).clip(min=0).sum())

    def moved(self, value: Array) -> bool:
        """Whether a picture moves it much further than clean ones do."""
        number = plain(value)
        if number.shape != self.low.shape:
            return True
        beyond = float(np.maximum(self.low - number, number - self.high).max(initial=0))
        size = max(self.scale, float(np.abs(number).max(initial=0)))
        return beyond > max(_TIMES * self.spread, _ROUNDING * size, 1e-6)
