"""Neural Cleanse's schedule for the cost of a large mask."""

from __future__ import annotations

from collections.abc import Mapping

from defense_nc.config import NCConfig


class CostSchedule:
    """The cost of the mask's norm, raised while the trigger succeeds and lowered while it fails.

    Pure book-keeping: one call per step.

    Source: the original's released code; "ports" differ only in starting at ``init_cost``.
    """

    def __init__(self, config: NCConfig) -> None:
        self._config = config
        self.cost = 0.0 if config.schedule == "original" else config.init_cost
        self.stop = False
        self._free_steps = self._above = self._below = self._stale = 0
        self._went_up = self._went_down = False
        self._best = float("inf")

    def state_dict(self) -> dict[str, float | int | bool | None]:
        """All that changes; None stands for infinity."""
        state = {name: value for name, value in vars(self).items() if name != "_config"}
        return {name: None if value == float("inf") else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, float | int | bool | None]) -> None:
        """Continue from another schedule's state."""
        for name, value in state.items():
            setattr(self, name, float("inf") if value is None else value)

    def update(self, success: float, best_norm: float) -> None:
        """Record a step's success in [0, 1], and the smallest norm of a successful step so far.

        Raises:
            ValueError: A success outside [0, 1] or a negative norm.
        """
        if not 0 <= success <= 1 or not best_norm >= 0:
            raise ValueError(
                f"expected success in [0, 1] and a norm >= 0, got {success}, {best_norm}"
            )
        self._watch(best_norm)
        if not self.stop:
            self._adjust(succeeded=success >= self._config.threshold)

    def _watch(self, best_norm: float) -> None:
        """Stop once the cost has gone both ways and the best norm has not improved for long."""
        if not self._config.early_stop:
            return
        if best_norm < float("inf"):
            stale = best_norm >= self._config.early_stop_threshold * self._best
            self._stale = self._stale + 1 if stale else 0
        self._best = min(best_norm, self._best)
        enough = self._stale >= self._config.early_stop_patience
        self.stop = enough and self._went_up and self._went_down

    def _adjust(self, *, succeeded: bool) -> None:
        patience = self._config.patience
        self._free_steps = self._free_steps + 1 if succeeded and self.cost == 0 else 0
        if self._free_steps >= patience:
            self.cost = self._config.init_cost
            self._free_steps = self._above = self._below = 0
            self._went_up = self._went_down = False
        # The step that ends the free phase counts as the first of the next run, as in the original.
        self._above = self._above + 1 if succeeded else 0
        self._below = 0 if succeeded else self._below + 1
        if self._above >= patience:
            self._above, self._went_up = 0, True
            self.cost *= self._config.multiplier
        elif self._below >= patience:
            self._below, self._went_down = 0, True
            self.cost /= self._config.multiplier**1.5
