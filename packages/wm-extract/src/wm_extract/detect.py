"""The detector of marked images: a score, and a threshold for a stated false-positive rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from wm_extract.unet import KIND, WEIGHTS, UNetExtractor
from wm_inject import (
    Checkpoint,
    CheckpointError,
    check_images,
    load_checkpoint,
    save_checkpoint,
)
from wm_inject.core.images import resized
from wm_inject.watermark.picture import check_watermark
from wm_inject.watermark.pretrained import read_pretrained

MIN_CALIBRATION = 50
CLIP = 1e-4  # keeps the score's logit finite


class Detection(NamedTuple):
    """A detector's output for a batch."""

    marked: Tensor  # bool (N,)
    score: Tensor  # float32 (N,), a logit; higher means more like the watermark
    maps: Tensor  # float32 (N, 1, H, W) in [0, 1], the extracted watermarks


def balanced_bit_accuracy(maps: Tensor, watermark: Tensor) -> Tensor:
    """The mean of the accuracies on the watermark's ones and on its zeros, at a threshold of 1/2.

    A constant map scores exactly 1/2, whatever share of the watermark is set. With one fixed
    watermark this measures presence as much as content, since an extractor can memorise it.

    Args:
        maps: float ``(N, 1, H, W)`` in [0, 1].
        watermark: float ``(1, H, W)`` in [0, 1] with both ones and zeros.
    """
    ones = _bits(watermark)
    check_images(maps, channels=1, size=(watermark.shape[1], watermark.shape[2]), name="maps")
    bits = (maps[:, 0] > 0.5).float()
    return (bits[:, ones].mean(1) + (1 - bits[:, ~ones].mean(1))) / 2


def mark_score(maps: Tensor, watermark: Tensor) -> Tensor:
    """How much extracted maps look like the watermark: float32 ``(N,)``.

    The mean of the map over the watermark's ones, minus its mean over the zeros, clipped below at
    0, as a logit, so that scores of clean images spread out instead of piling up at 0. Arguments
    as for `balanced_bit_accuracy`.
    """
    ones = _bits(watermark)
    check_images(maps, channels=1, size=(watermark.shape[1], watermark.shape[2]), name="maps")
    contrast = maps[:, 0][:, ones].mean(1) - maps[:, 0][:, ~ones].mean(1)
    return contrast.clamp(CLIP, 1 - CLIP).logit()


def _bits(watermark: Tensor) -> Tensor:
    check_watermark(watermark, size=watermark.shape[-1] if watermark.ndim else 0)
    ones = watermark[0] > 0.5
    if ones.all() or not ones.any():
        raise ValueError("expected a watermark with both ones and zeros")
    return ones


@dataclass(frozen=True, eq=False)
class MarkDetector:
    """An extractor, its watermark and a threshold.

    Args:
        extractor: The trained extractor, in eval mode.
        watermark: float32 ``(1, H, W)``.
        threshold: Smallest score that counts as marked (see `mark_score`).
        false_positive_rate: The rate that the threshold was chosen for.
        calibrated_on: Number of clean images it was chosen on.
    """

    extractor: UNetExtractor
    watermark: Tensor
    threshold: float
    false_positive_rate: float
    calibrated_on: int

    @classmethod
    def calibrate(
        cls,
        extractor: UNetExtractor,
        watermark: Tensor,
        clean: Tensor,
        *,
        marked: Tensor | None = None,
        false_positive_rate: float = 1e-3,
    ) -> MarkDetector:
        """Choose the threshold on clean images that the training did not see.

        The threshold is the larger of two estimates of the (1 - rate) quantile of the clean
        scores: the empirical one, which cannot look beyond the sample, and that of a normal
        distribution fitted to them, which can. Where marked images are given and score higher
        still, the threshold moves up to the middle of the gap, so that corruption carries neither
        kind of image across it.

        Args:
            extractor: The trained extractor.
            watermark: float32 ``(1, H, W)``.
            clean: Unmarked images, at least 50; each is read at the watermark's size.
            marked: Marked images, at least 50, if there are some.
            false_positive_rate: The stated rate, in (0, 0.5), and at most that.
        """
        for name, images in {"clean": clean, "marked": marked}.items():
            if images is None:
                continue
            if len(check_images(images, name=f"{name} images")) < MIN_CALIBRATION:
                raise ValueError(
                    f"expected at least {MIN_CALIBRATION} {name} images to calibrate on, "
                    f"got {len(images)}"
                )
        if not 0 < false_positive_rate < 0.5:
            raise ValueError(
                f"expected a false-positive rate in (0, 0.5), got {false_positive_rate}"
            )
        side = watermark.shape[-1]
        scores = mark_score(extract(extractor, clean, side=side), watermark).double()
        threshold = _upper_quantile(scores, false_positive_rate)
        if marked is not None:
            marked_scores = mark_score(extract(extractor, marked, side=side), watermark)
            lowest = -_upper_quantile(-marked_scores, 1e-3)
            threshold = max(threshold, (threshold + lowest) / 2)
        return cls(extractor, watermark, threshold, false_positive_rate, len(clean))

    @classmethod
    def from_pretrained(cls, name: str) -> MarkDetector:
        """The detector of the mark that `wm_inject.WatermarkTrigger.from_pretrained` hides.

        ``name`` is one of `wm_inject.PRETRAINED`.

        Raises:
            ValueError: No weights of this name.
            CheckpointError: The file is not the one that was shipped.
        """
        return _detector(read_pretrained(name, kind=KIND, folder=WEIGHTS))

    def detect(self, images: Tensor) -> Detection:
        """Decide for every image; each is read at the watermark's size."""
        maps = extract(self.extractor, images, side=self.watermark.shape[-1])
        score = mark_score(maps, self.watermark.to(maps.device))
        # Strictly above: the empirical quantile is a clean image's own score.
        return Detection(score > self.threshold, score, maps)


def _upper_quantile(scores: Tensor, rate: float) -> float:
    """A score that a share ``rate`` of the population exceeds, on the safe side."""
    scores = scores.double()
    empirical = float(scores.quantile(1 - rate, interpolation="higher"))
    normal = float(scores.mean() + NormalDist().inv_cdf(1 - rate) * scores.std())
    return max(empirical, normal)


def extract(
    extractor: UNetExtractor, images: Tensor, *, side: int | None = None, batch_size: int = 256
) -> Tensor:
    """Extract the maps of many images: float32 ``(N, 1, H, W)`` in [0, 1], without gradients.

    The extractor must be in eval mode: an image's map must not depend on its neighbours. With a
    side, images are shrunken to that many pixels first, and so are their maps.
    """
    if extractor.training:
        raise ValueError("expected the extractor in eval mode, got it in train mode")
    check_images(images)
    with torch.inference_mode():
        parts = images.split(batch_size)
        if side is not None:
            parts = [resized(part, (side, side)).clamp(0, 1) for part in parts]
        return torch.cat([extractor(part) for part in parts]).clone()


def save_detector(detector: MarkDetector, path: str | Path) -> None:
    """Write a detector with its extractor and watermark to one checkpoint."""
    save_checkpoint(
        path,
        kind=KIND,
        config={
            "extractor": detector.extractor.config,
            "threshold": detector.threshold,
            "false_positive_rate": detector.false_positive_rate,
            "calibrated_on": detector.calibrated_on,
        },
        state={
            "watermark": detector.watermark,
            **{f"extractor.{k}": v for k, v in detector.extractor.state_dict().items()},
        },
    )


def load_detector(path: str | Path) -> MarkDetector:
    """Read a detector, its extractor in eval mode on the CPU; ``CheckpointError`` if it is none."""
    saved = load_checkpoint(path, kind=KIND)
    try:
        return _detector(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{Path(path).name} is not a detector: {first}") from error


def _detector(saved: Checkpoint) -> MarkDetector:
    """The detector in a checkpoint that `save_detector` wrote."""
    return MarkDetector(
        UNetExtractor.from_checkpoint(saved),
        saved.state["watermark"].float(),  # weights may be stored in 16 bits
        float(saved.config["threshold"]),
        float(saved.config["false_positive_rate"]),
        int(saved.config["calibrated_on"]),
    )
