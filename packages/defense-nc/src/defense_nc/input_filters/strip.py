"""STRIP: a triggered image keeps its label whatever is laid over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.input_filters.detector import CalibratedDetector, check_rate, threshold_at
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.inference import device_of, predict


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Settings of STRIP."""

    name: ClassVar[str] = "strip"
    overlays: int = 32  # clean images that are laid over each image in turn
    calibration: int = 400  # images that the threshold is chosen on, at most
    false_positive_rate: float = 0.01  # in [0, 1)
    batch_size: int = 256

    def __post_init__(self) -> None:
        least = min(self.overlays, self.calibration, self.batch_size)
        if least < 1:
            raise ValueError(f"expected overlays, calibration, batch_size >= 1, got {least}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> Strip:
        """Named settings with changes; "paper" has 100 overlays and calibrates on up to 2,000."""
        return preset_of(cls, PRESETS, name, **changes)

    def calibrate(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
    ) -> CalibratedDetector:
        """Draw the overlays, and choose the threshold on clean images that are none of them.

        The score is minus the mean entropy in bits, from -log2 K to 0. All images are scored with
        the same overlays, which ``seed`` chooses; there must be more images than overlays.

        Source: Gao et al. 2019, section IV. There the threshold comes from a normal curve and each
            image meets overlays of its own; here it is the empirical quantile.
        """
        check_images(images)
        if len(images) <= self.overlays:
            raise ValueError(f"expected more than {self.overlays} images, got {len(images)}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        overlays = images[order[: self.overlays]]
        rest = images[order[self.overlays :][: self.calibration]]

        def score(batch: Tensor) -> Tensor:
            return -strip_entropy(model, batch, overlays, batch_size=self.batch_size)

        scores = score(rest)
        log = {
            "overlays": len(overlays),
            "images": len(rest),
            "mean_entropy": -float(scores.mean()),
        }
        threshold = threshold_at(scores, self.false_positive_rate)
        return CalibratedDetector(self.name, threshold, tuple(images.shape[1:]), score, log)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"overlays": 100, "calibration": 2000},
}


def strip_entropy(
    model: nn.Module, images: Tensor, overlays: Tensor, *, batch_size: int = 256
) -> Tensor:
    """Mean entropy in bits of the answers to each image with each of ``overlays`` laid over it.

    Returns:
        Float64 ``(N,)`` on the CPU, from 0 to log2 K.

    Source: Gao et al. 2019. Pixels are added in 8 bits and saturate, as in the released code.
    """
    check_images(images)
    channels, height, width = images.shape[1:]
    check_images(overlays, channels=channels, size=(height, width), name="overlays")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    device = device_of(model)
    grid = quantize(overlays.to(device))
    means = []
    for part in quantize(images.to(device)).split(max(1, batch_size // len(grid))):
        mixed = quantize(part[:, None].add(grid).flatten(0, 1))  # (n * M, C, H, W)
        logits = predict(model, mixed, batch_size=batch_size)
        means.append(_entropy(logits).view(len(part), len(grid)).mean(1))
    return torch.cat(means).cpu()


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax in bits, float64 ``(N,)``."""
    log_p = logits.double().log_softmax(1)
    bits = -(log_p.exp() * log_p).sum(1) / math.log(2)
    return bits.clamp(0, math.log2(logits.shape[1]))
