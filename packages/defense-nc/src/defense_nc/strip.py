"""STRIP: a triggered image keeps its label whatever is laid over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.input_detector import CalibratedDetector, check_rate, threshold_at
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_victim.inference import frozen, predict


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Settings of STRIP. The defaults are the preset "small".

    Args:
        overlays: Clean images that are laid over each image in turn.
        calibration: Most clean images that the threshold is chosen on.
        false_positive_rate: Share of clean images that may be held to be triggered, in [0, 1).
        batch_size: Images per pass.

    Raises:
        ValueError: A value outside its range.
    """

    overlays: int = 32
    calibration: int = 400
    false_positive_rate: float = 0.01
    batch_size: int = 256

    def __post_init__(self) -> None:
        least = min(self.overlays, self.calibration, self.batch_size)
        if least < 1:
            raise ValueError(f"expected overlays, calibration, batch_size >= 1, got {least}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "small", **changes: Any) -> Strip:
        """The settings of this name, small or paper, with some of them changed.

        "paper" lays 100 images over each and calibrates on up to 2,000.

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"expected a preset in {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def name(self) -> str:
        """What it is called in records and tables."""
        return "strip"

    def calibrate(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
    ) -> CalibratedDetector:
        """Draw the overlays, and choose the threshold on clean images that are none of them.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; not changed, and kept for scoring.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1], more than ``overlays``.
            triggers: Not used: STRIP is blind.
            seed: Seeds which images become overlays. All images are scored with the same ones.

        Returns:
            The detector: its score is minus the mean entropy in bits, from -log2 K to 0.

        Raises:
            ValueError: Bad images or too few of them, or a model that gives no logits.

        Source: Gao et al. 2019, section IV. There the threshold comes from a normal curve and each
            image meets overlays of its own; here it is the empirical quantile.
        """
        check_images(images)
        if len(images) <= self.overlays:
            raise ValueError(f"expected more than {self.overlays} images, got {len(images)}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        overlays = images[order[: self.overlays]]
        rest = images[order[self.overlays :][: self.calibration]]

        def suspicion(batch: Tensor) -> Tensor:
            return -strip_entropy(model, batch, overlays, batch_size=self.batch_size)

        scores = suspicion(rest)
        log = {
            "overlays": len(overlays),
            "images": len(rest),
            "mean_entropy": -float(scores.mean()),
        }
        threshold = threshold_at(scores, self.false_positive_rate)
        return CalibratedDetector(self.name, threshold, tuple(images.shape[1:]), suspicion, log)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {"overlays": 100, "calibration": 2000},
}


def strip_entropy(
    model: nn.Module, images: Tensor, overlays: Tensor, *, batch_size: int = 256
) -> Tensor:
    """How undecided a classifier is about an image when others are laid over it.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: float32 ``(N, C, H, W)`` in [0, 1].
        overlays: float32 ``(M, C, H, W)`` in [0, 1]: each is laid over each image.
        batch_size: Images per pass.

    Returns:
        The mean entropy of the M answers in bits, float64 ``(N,)`` on the CPU, from 0 to log2 K.

    Raises:
        ValueError: Bad images or overlays, overlays of another shape, or a model that gives no
            logits.

    Source: Gao et al. 2019. Pixels are added in 8 bits and saturate, as in the released code.
    """
    check_images(images)
    channels, height, width = images.shape[1:]
    check_images(overlays, channels=channels, size=(height, width), name="overlays")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    with frozen(model):
        device = next((p.device for p in model.parameters()), images.device)
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
