"""The search for the attack's weight in a generator's loss."""

from __future__ import annotations

from collections.abc import Mapping

from defense_reverse.config import ReverseConfig as ReverseConfig

_NARROW = 1.1  # a bracket of less than this factor has told all it can


class LambdaSearch:
    """The binary search for lambda_1: pure, one decision at a time.

    After a failure lambda_1 grows, after a success it shrinks; between the last failure and the
    last success it takes their geometric mean. The generator learns while the search goes on, so
    that an old failure says less and less: a bracket that has become narrow is opened again, by
    the smaller factor on both sides.

    Args:
        start: The first value.
        growth: Factor after a failure before any success.
        shrink: Divisor after a success with no failure below it; opens a narrow bracket too.

    Raises:
        ValueError: A negative start, or a factor not above 1.

    Source: the paper searches lambda_1 by "a binary search ... to achieve a high attack success
        rate" and tells no more.
    """

    def __init__(self, start: float, *, growth: float = 2.0, shrink: float = 1.5) -> None:
        if not 0 <= start < float("inf"):
            raise ValueError(f"expected a first weight >= 0, got {start}")
        if not growth > 1 or not shrink > 1:
            raise ValueError(f"expected growth and shrink above 1, got {growth} and {shrink}")
        self.value = float(start)
        self._growth, self._shrink = growth, shrink
        self._failure: float | None = None
        self._success: float | None = None

    def __repr__(self) -> str:
        return f"LambdaSearch(value={self.value:.4g})"

    def state(self) -> dict[str, float | None]:
        """What a checkpoint needs."""
        return {"value": self.value, "failure": self._failure, "success": self._success}

    def restore(self, state: Mapping[str, float | None]) -> None:
        """Go on from what `state` gave."""
        assert state["value"] is not None
        self.value = state["value"]
        self._failure, self._success = state["failure"], state["success"]

    def update(self, *, success: bool) -> float:
        """Take in whether the floor was reached with the present value, and give the next one."""
        if success:
            self._success = self.value
        else:
            self._failure = self.value
        low, high = self._failure, self._success
        if low is not None and high is not None and high > low * _NARROW:
            self.value = (low * high) ** 0.5
        elif success:
            self.value /= self._shrink
        else:
            self.value *= self._growth if high is None else self._shrink
        return self.value
