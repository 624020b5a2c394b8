"""Input detectors: a score per image, and a threshold above which it is triggered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images
from wm_inject.core.plan import Trigger
from wm_victim.inference import device_of, frozen, images_a_pass

MIN_IMAGES = 40  # twenty to set a filter up, twenty for its threshold


class InputDetector(Protocol):
    """Settings of an input detector, which are calibrated once on clean images."""

    @property
    def name(self) -> str:
        """Its name in records and tables, for example "strip"."""

    def calibrate(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
    ) -> CalibratedDetector:
        """Choose the threshold on clean images; blind detectors ignore the reversed triggers."""


@dataclass(frozen=True)
class CalibratedDetector:
    """Judges images, one by one or in batches, with the same answer. Refers to the classifier.

    Args:
        name: The detector's name.
        threshold: Images that score above it are flagged as triggered; finite.
        shape: ``(C, H, W)`` of the images that it was calibrated on.
        scorer: Checked images to float64 ``(N,)`` on the CPU, larger for triggered ones.
        log: How it was calibrated, ready for JSON.
    """

    name: str
    threshold: float
    shape: tuple[int, ...]
    scorer: Callable[[Tensor], Tensor] = field(repr=False)
    log: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"expected a finite threshold, got {self.threshold}")

    def score(self, images: Tensor) -> Tensor:
        """Float64 ``(N,)`` on the CPU, larger for triggered images."""
        channels, height, width = self.shape
        check_images(images, channels=channels, size=(height, width))
        return self.scorer(images)

    def decide(self, images: Tensor) -> Tensor:
        """Which images are flagged: bool ``(N,)`` on the CPU."""
        return self.score(images) > self.threshold


def threshold_at(scores: Tensor, false_positive_rate: float) -> float:
    """The lowest of the clean scores ``(N,)`` that at most this share of them exceed.

    Raises:
        ValueError: Scores that are not finite floats, or a rate outside [0, 1).
    """
    _check_scores(scores)
    check_rate(false_positive_rate)
    # The epsilon: 0.07 * 100 is 7.000000000000001, but 0.29 * 100 is 28.999999999999996.
    allowed = math.floor(false_positive_rate * len(scores) + 1e-9)
    return float(scores.sort(descending=True).values[allowed])


def conformal_threshold(scores: Tensor, false_positive_rate: float) -> float:
    """A threshold that a new clean image exceeds with at most this probability, in (0, 1).

    For scores ``(N,)`` that chose nothing else, and new images drawn from the same distribution.
    `threshold_at`, a little less careful, bounds the share of the calibration images themselves.

    Raises:
        ValueError: As `threshold_at`, or too few scores for the rate.

    Source: split conformal prediction: the k-th largest of N scores is exceeded with probability at
        most k / (N + 1).
    """
    _check_scores(scores)
    check_rate(false_positive_rate)
    rank = math.floor(false_positive_rate * (len(scores) + 1) + 1e-9)
    if rank < 1:
        raise ValueError(
            f"expected scores of more images for a false_positive_rate of {false_positive_rate:g}, "
            f"got {len(scores)}"
        )
    return float(scores.sort(descending=True).values[rank - 1])


def auroc(scores: Tensor, truths: Tensor) -> float:
    """Area under the ROC curve: the share of (triggered, clean) pairs in which the first is higher.

    Args:
        scores: Floating ``(N,)``, finite, larger for triggered images.
        truths: bool ``(N,)``: which images are triggered; both kinds must occur.

    Source: Mann and Whitney's statistic, from ranks; ties count half.
    """
    _check_scores(scores)
    if not isinstance(truths, Tensor) or truths.dtype != torch.bool:
        raise ValueError("expected truths as a bool tensor")
    if truths.shape != scores.shape:
        raise ValueError(f"expected truths of shape {tuple(scores.shape)}, got {truths.shape}")
    positives = int(truths.sum())
    negatives = len(truths) - positives
    if positives == 0 or negatives == 0:
        raise ValueError(
            f"expected triggered and clean images, got {positives} and {negatives} of them"
        )
    _, group, counts = scores.unique(return_inverse=True, return_counts=True)
    # Images with the same score share the mean of the ranks 1 .. N that they take up.
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    total = float(ranks[group][truths].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def scores_of(network: nn.Module, images: Tensor) -> Tensor:
    """The scores that a network gives: float64 ``(N,)`` on the CPU, as many at once as fit.

    Args:
        images: Checked, float32 ``(N, C, H, W)`` in [0, 1], on any device.
    """
    device = device_of(network)
    with frozen(network), torch.no_grad():
        parts = images.split(images_a_pass(images, device, most=256))
        return torch.cat([network(part.to(device)).double().cpu() for part in parts])


def two_halves(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Clean images in two random halves: one sets a filter up, the other chooses its threshold.

    The second is to choose nothing else (`conformal_threshold`).

    Args:
        images: Float32 ``(N, C, H, W)`` in [0, 1], at least 40.

    Raises:
        ValueError: Bad images, or fewer.
    """
    check_images(images)
    if len(images) < MIN_IMAGES:
        raise ValueError(f"expected at least {MIN_IMAGES} images, got {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[::2]], images[order[1::2]]


def check_rate(false_positive_rate: float) -> None:
    """Raise ``ValueError`` for a rate outside [0, 1)."""
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"expected a false_positive_rate in [0, 1), got {false_positive_rate}")


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise ValueError("expected scores as a floating tensor")
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"expected scores of shape (N,), N >= 1, got {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("expected finite scores, got NaN or infinity")
