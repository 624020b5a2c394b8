"""Neural Cleanse's settings, and its schedule for the price of a large mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_SCHEDULES = ("original", "ports")
_STARTS = ("random", "ones")


@dataclass(frozen=True)
class NCConfig:
    """Settings of Neural Cleanse. The defaults are the preset "robust".

    Args:
        steps: Steps of the schedule, at most.
        batches: Mini-batches per step; one step of the original is 1000 samples.
        batch_size: Images per mini-batch.
        lr: Adam's learning rate.
        betas: Adam's decay rates.
        schedule: "original" starts with a free mask (cost 0); "ports" charges for it at once.
        starts: One search each, the smallest result counts: "random" draws mask and pattern
            uniformly, "ones" starts from a white mask of 0.88. A single search can end in a mask
            several times too large, with BadNets on MNIST every second one.
        init_cost: The first cost above zero, per pixel of mask.
        threshold: Share of a step's images that must reach the label, in (0, 1].
        patience: Steps in a row above (below) the threshold before the cost rises (falls).
        multiplier: The cost rises by this factor, and falls by its power of 1.5.
        early_stop: Stop when the best mask improves no more.
        early_stop_threshold: An improvement is a norm below this share of the best one so far.
        early_stop_patience: Steps in a row without one.
        fallbacks: How many of the best masks to keep. A mask shrinks on during the step that it is
            judged by, so the best may fall short of ``floor``: then the next best that does not is
            taken. 1 takes the best whatever it does, as the paper does.
        floor: A label whose final trigger reaches fewer images than this has no comparable score.

    Raises:
        ValueError: A value outside its range.

    Source: Neural Cleanse (Wang 2019), its released code, and two PyTorch ports of it.
    """

    steps: int = 150
    batches: int = 8
    batch_size: int = 32
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    schedule: Literal["original", "ports"] = "original"
    starts: tuple[Literal["random", "ones"], ...] = ("ones", "random", "random")
    init_cost: float = 1e-3
    threshold: float = 0.99
    patience: int = 3
    multiplier: float = 2.0
    early_stop: bool = True
    early_stop_threshold: float = 0.99
    early_stop_patience: int = 15
    fallbacks: int = 8
    floor: float = 0.9

    def __post_init__(self) -> None:
        counts = ("steps", "batches", "batch_size", "patience", "early_stop_patience", "fallbacks")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("lr", "init_cost"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("threshold", "floor", "early_stop_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if not self.multiplier > 1:
            raise ValueError(f"expected a multiplier > 1, got {self.multiplier}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        known = self.starts and set(self.starts) <= set(_STARTS)
        if self.schedule not in _SCHEDULES or not known:
            raise ValueError(
                f"expected schedule in {', '.join(_SCHEDULES)} and starts from "
                f"{', '.join(_STARTS)}, got {self.schedule!r}, {self.starts!r}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NCConfig:
        """The settings of this name, paper, ports, robust or fast, with some of them changed.

        "paper" is the original's example script: up to 1000 steps of 31 batches per label. "ports"
        is what the PyTorch ports do (their early stop as written stops never; this one does).
        "robust" is the default. "fast" takes at most 240 mini-batches per label.

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"expected a preset in {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "steps": 1000,
        "batches": 31,
        "patience": 5,
        "early_stop_threshold": 1.0,
        "early_stop_patience": 25,
        "fallbacks": 1,
        "starts": ("random",),
    },
    "ports": {
        "steps": 50,
        "batches": 31,
        "batch_size": 64,
        "schedule": "ports",
        "starts": ("ones",),
        "threshold": 0.98,
        "patience": 5,
        "early_stop_patience": 25,
        "fallbacks": 1,
    },
    "robust": {},
    "fast": {
        "steps": 60,
        "batches": 4,
        "patience": 2,
        "early_stop_patience": 8,
        "starts": ("random",),
    },
}


class CostSchedule:
    """The cost of the mask's norm, raised while the trigger succeeds and lowered while it fails.

    Pure book-keeping: one call per step with what the step saw, so it is tested with scripts.

    Args:
        config: The schedule's constants.

    Source: the original's released code; "ports" differ only in starting at ``init_cost``.
    """

    def __init__(self, config: NCConfig) -> None:
        self._config = config
        self.cost = 0.0 if config.schedule == "original" else config.init_cost
        self.stop = False
        self._free_steps = self._above = self._below = self._stale = 0
        self._went_up = self._went_down = False
        self._best = float("inf")

    def __repr__(self) -> str:
        return f"CostSchedule(cost={self.cost:g}, stop={self.stop})"

    def update(self, success: float, best_norm: float) -> None:
        """Take in one step.

        Args:
            success: Share of the step's images that reached the label, in [0, 1].
            best_norm: The smallest mask norm so far among successful steps; infinite before one.

        Raises:
            ValueError: A share outside [0, 1] or a negative norm.
        """
        if not 0 <= success <= 1 or not best_norm >= 0:
            raise ValueError(
                f"expected success in [0, 1] and a norm >= 0, got {success}, {best_norm}"
            )
        self._watch(best_norm)
        if not self.stop:
            self._price(succeeded=success >= self._config.threshold)

    def _watch(self, best_norm: float) -> None:
        """Stop once the cost has gone both ways and the best norm has long stood still."""
        if not self._config.early_stop:
            return
        if best_norm < float("inf"):
            stale = best_norm >= self._config.early_stop_threshold * self._best
            self._stale = self._stale + 1 if stale else 0
        self._best = min(best_norm, self._best)
        enough = self._stale >= self._config.early_stop_patience
        self.stop = enough and self._went_up and self._went_down

    def _price(self, *, succeeded: bool) -> None:
        patience = self._config.patience
        self._free_steps = self._free_steps + 1 if succeeded and self.cost == 0 else 0
        if self._free_steps >= patience:
            self.cost = self._config.init_cost
            self._free_steps = self._above = self._below = 0
            self._went_up = self._went_down = False
        # The step that ends the free phase counts as the first of the next run, as it does there.
        self._above = self._above + 1 if succeeded else 0
        self._below = 0 if succeeded else self._below + 1
        if self._above >= patience:
            self._above, self._went_up = 0, True
            self.cost *= self._config.multiplier
        elif self._below >= patience:
            self._below, self._went_down = 0, True
            self.cost /= self._config.multiplier**1.5
