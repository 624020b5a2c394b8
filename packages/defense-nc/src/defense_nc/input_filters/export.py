"""Export an input filter, threshold and all, for services that run without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from defense_nc.input_filters.detector import CalibratedDetector
from defense_nc.input_filters.feature_score import FeatureScore
from defense_nc.input_filters.layer_ranks import RankScore
from defense_nc.input_filters.parameter_scaling import ScalingScore
from wm_inject import Parity, check_images, to_onnx
from wm_victim.loading.onnx_module import OnnxNet

TOLERANCE = 1e-3  # of the largest score


def export_filter(
    detector: CalibratedDetector,
    images: Tensor,
    path: str | Path,
    *,
    uint8: bool = True,
    **settings: Any,
) -> Parity:
    """Write an input filter as ONNX, for `wm_inject.runtime.Scanner`; compared on 3 or more images.

    Args:
        detector: A calibrated filter, other than STRIP, which lays images of its own over each.
        uint8: Take stored pixels, uint8 ``(N, H, W, C)``.
        settings: More of what `wm_inject.to_onnx` takes, such as precision.

    Raises:
        ValueError: Another kind of detector, images of another shape, or as `wm_inject.to_onnx`.
        ParityError: The file computes something else.
    """
    kinds = FeatureScore | RankScore | ScalingScore
    if not isinstance(detector, CalibratedDetector) or not isinstance(detector.scorer, kinds):
        name = getattr(detector, "name", type(detector).__name__)
        raise ValueError(f"expected a calibrated input filter, got {name}")
    channels, height, width = detector.shape
    check_images(images, channels=channels, size=(height, width))
    of_ranks = isinstance(detector.scorer, RankScore)
    looks_for = "answers that scaled normalisation does not change"
    if of_ranks:
        looks_for = "layers in which an image lies far from the class that it is taken for"
    if "label" in detector.log:
        looks_for = f"a reversed trigger of label {detector.log['label']}"
    about = {
        "looks_for": looks_for,
        # A detector flags above its threshold, a file from its threshold on.
        "threshold": float(np.nextafter(np.float32(detector.threshold), np.float32(np.inf))),
        "false_positive_rate": float(detector.log["false_positive_rate"]),
        "calibrated_on": int(detector.log["images"]),
        "method": detector.name,
    }
    network = detector.scorer.network()
    return to_onnx(
        network,
        images,
        path,
        uint8=uint8,
        output_names=("score",),
        **{
            "tolerance": TOLERANCE,
            "relative": True,
            # Layers are listened to; sizes pass through tensors in imported graphs.
            "traced": of_ranks or any(isinstance(part, OnnxNet) for part in network.modules()),
            **settings,
            "metadata": {
                "kind": "input-filter",
                "detector": about,
                **settings.get("metadata", {}),
            },
        },
    )
