"""Export a detector of marked images, threshold and all, for services that run without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_extract.detect import CLIP, MarkDetector
from wm_inject import Parity, check_images, to_onnx, to_torchscript

TOLERANCE = 1e-3  # of the largest score: a logit near its clip spreads rounding a thousandfold


class MarkNetwork(nn.Module):
    """A detector as a module; its extractor and watermark are shared, not copied."""

    kind = "mark-detector"
    contrast: Tensor

    def __init__(self, detector: MarkDetector) -> None:
        super().__init__()
        self.extractor = detector.extractor
        self.register_buffer("watermark", detector.watermark)
        ones = detector.watermark[0].flatten() > 0.5
        # The mean over the ones minus the mean over the zeros, as one sum.
        contrast = ones / ones.sum() - (~ones) / (~ones).sum()
        self.register_buffer("contrast", contrast.float(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(N,)``, as `mark_score`, and maps ``(N, 1, H, W)`` of images."""
        maps = self.extractor(images)
        score = (maps.flatten(1) @ self.contrast).clamp(CLIP, 1 - CLIP).logit()
        return score, maps


def export_detector(
    detector: MarkDetector,
    images: Tensor,
    path: str | Path,
    *,
    uint8: bool = True,
    **settings: Any,
) -> Parity:
    """Write a detector as ONNX (``.onnx``) or TorchScript (``.pt``), outputs "score" and "map".

    The ONNX file is what `wm_inject.runtime.Extractor` and ``Scanner`` open.

    Args:
        detector: The calibrated detector.
        images: At least three, to compare file and detector on.
        uint8: For ONNX, take stored pixels, uint8 ``(N, H, W, C)``.
        settings: Arguments of `wm_inject.to_onnx` or ``to_torchscript``, such as precision.

    Raises:
        ValueError: Not a detector, images of another shape, or another suffix.
        ParityError: The file computes something else.
    """
    if not isinstance(detector, MarkDetector):
        raise ValueError(f"expected a MarkDetector, got {type(detector).__name__}")
    if Path(path).suffix not in (".onnx", ".pt"):
        raise ValueError(f"expected a file .onnx or .pt, got {Path(path).name}")
    side = detector.watermark.shape[-1]
    check_images(images, channels=detector.extractor.config["channels"], size=(side, side))
    description = {
        "looks_for": "a watermark",
        "threshold": detector.threshold,
        "false_positive_rate": detector.false_positive_rate,
        "calibrated_on": detector.calibrated_on,
    }
    settings = {
        "tolerance": TOLERANCE,
        "relative": True,
        **settings,
        "metadata": {"detector": description, **settings.get("metadata", {})},
    }
    network = MarkNetwork(detector)
    if Path(path).suffix == ".pt":
        return to_torchscript(network, images, path, **settings)
    return to_onnx(network, images, path, uint8=uint8, output_names=("score", "map"), **settings)
