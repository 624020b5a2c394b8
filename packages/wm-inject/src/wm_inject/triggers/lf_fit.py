"""The search behind the LF trigger: DeepFool steps towards one label, kept smooth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.resume import fingerprint

_BATCH = 64  # images at once where only predictions are wanted
_FLAT = 5, 0.01  # the search stops when this many fooling rates lie this close together


@dataclass(frozen=True)
class LfConfig:
    """How the pattern is searched. The defaults are the published ones, the preset "paper".

    Args:
        images: How many images to search on.
        passes: The most passes over them.
        iterations: The most DeepFool steps per image; an image that needs more is passed over.
        overshoot: How much further than DeepFool's step to go, as a share of it.
        limit: Largest value of the pattern, in (0, 1].
        enough: Stop when this share of the images gets another prediction with the pattern.
        sigma: Width of the low-pass in pixels at 32 pixels; it grows with the image [ours].

    Raises:
        ValueError: A value out of range.
    """

    images: int = 100
    passes: int = 50
    iterations: int = 200
    overshoot: float = 0.02
    limit: float = 0.2
    enough: float = 0.2
    sigma: float = 6.0

    def __post_init__(self) -> None:
        for name in ("images", "passes", "iterations"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("limit", "enough"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.overshoot < float("inf") or not 0 < self.sigma < float("inf"):
            raise ValueError(
                f"expected overshoot >= 0 and sigma > 0, got {self.overshoot} and {self.sigma}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LfConfig:
        """The settings of this name, with some of them changed.

        "paper" is the published search; "small" gives up sooner on stubborn images (a minute on
        one CPU core with a narrow network at 32 pixels); "tiny" is for tests.

        Raises:
            ValueError: No such preset, or a value out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset in {', '.join(_PRESETS)}, got {name!r}")
        return cls(**{**_PRESETS[name], **changes})


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"images": 20, "passes": 2, "iterations": 10},
    "small": {"passes": 8, "iterations": 30},
    "paper": {},
}


class Search:
    """The pattern so far, and how it gets better."""

    def __init__(self, surrogate: nn.Module, images: Tensor, target: int, config: LfConfig) -> None:
        self.surrogate, self.images = surrogate, images
        self.target, self.config = target, config
        self.kernel = _kernel(config.sigma * images.shape[3] / 32).to(images.device)
        self.clean = self._predict(images)
        self.pattern = torch.zeros_like(images[0])
        self.best = self.pattern
        self.rates: list[float] = []

    @property
    def done(self) -> bool:
        """The pattern is good enough, no longer changes much, or was given enough passes."""
        many, close = _FLAT
        last = self.rates[-many:]
        flat = len(last) == many and max(last) - min(last) <= close
        enough = bool(last) and last[-1] >= self.config.enough
        return enough or flat or len(self.rates) >= self.config.passes

    def run_pass(self, order: Tensor) -> None:
        """Go over the images once, and measure."""
        for place in order.tolist():
            start = (self.images[place : place + 1] + self.pattern).clamp(0, 1)
            step = self._deepfool(start, int(self.clean[place]))
            if step is None:
                continue
            smooth = _low_pass(self.pattern + _low_pass(step[0], self.kernel), self.kernel)
            low, high = torch.aminmax(smooth)
            if high > low:
                # The quotient first: then the largest value is the limit to the last bit.
                self.pattern = self.config.limit * ((smooth - low) / (high - low))
        rate = self._fooling_rate()
        if not self.rates or rate >= max(self.rates):
            self.best = self.pattern
        self.rates.append(rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"pattern": self.pattern, "best": self.best, "rates": self.rates}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, if there is one."""
        if state is not None:
            self.pattern = state["pattern"].to(self.images)
            self.best = state["best"].to(self.images)
            self.rates = state["rates"]

    def fingerprint(self) -> str:
        """SHA-256 of the surrogate and the images."""
        return fingerprint(self.images, *self.surrogate.state_dict().values())

    def _deepfool(self, start: Tensor, clean: int) -> Tensor | None:
        """The smallest step from ``start`` ``(1, C, H, H)`` to the target.

        None if the prediction is no longer the clean one, is the target already, or no step is
        found.
        """
        change = torch.zeros_like(start)
        reach = 1 + self.config.overshoot
        for count in range(self.config.iterations + 1):
            with torch.enable_grad():
                point = (start + reach * change).clamp(0, 1).requires_grad_()
                logits = self.surrogate(point)[0]
                label = int(logits.argmax())
                if label == self.target:
                    return reach * change if count else None
                if count == 0 and label != clean:
                    return None
                gap = logits[self.target] - logits[clean]
                # Two classes are enough for a target, so one backward pass is, too.
                (slope,) = torch.autograd.grad(gap, point)
            step = gap.detach().abs() / slope.square().sum() * slope
            if not bool(step.isfinite().all()):
                return None
            change = change + step
        return None

    def _fooling_rate(self) -> float:
        moved = self._predict((self.images + self.pattern).clamp(0, 1)) != self.clean
        return float(moved.double().mean())

    def _predict(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([self.surrogate(part) for part in images.split(_BATCH)])
        if logits.ndim != 2 or not 0 <= self.target < logits.shape[1]:
            raise ValueError(
                f"expected logits (N, K) with a target {self.target} below K, "
                f"got {tuple(logits.shape)}"
            )
        return logits.argmax(dim=1)


def _kernel(sigma: float) -> Tensor:
    """A Gaussian over 5 sigma, whose weights sum to 1: 30 of them for 6 pixels."""
    taps = max(1, round(5 * sigma))
    line = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    weights = torch.exp(-line.square() / (2 * sigma**2))
    return (weights / weights.sum()).float()


def _low_pass(image: Tensor, kernel: Tensor) -> Tensor:
    """Smooth ``(C, H, H)`` along both sides, with black outside."""
    after = len(kernel) // 2
    before = len(kernel) - 1 - after
    padded = F.pad(image[:, None], (before, after, before, after))
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]
