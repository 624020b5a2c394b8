"""What is known of a scanned model, to compare it with those a verdict was calibrated on."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from wm_inject.core.images import check_images
from wm_victim.inference import predict

Network = Literal["convolutional", "transformer", "other"]

_ATTENTION = re.compile(r"attention|transformer", re.IGNORECASE)
_CONVOLUTION = re.compile(r"Conv[123]d")


@dataclass(frozen=True)
class ModelInfo:
    """Classes, images and kind of network of one scanned model.

    Args:
        classes: Number of labels, >= 2.
        image_size: The longer side in pixels, >= 1.
        channels: Of the images, >= 1.
        network: "convolutional", "transformer" (attention anywhere in it) or "other".
        images: How many clean images the scan used, >= 1.

    Raises:
        ValueError: A number or a name out of range.
    """

    classes: int
    image_size: int
    channels: int
    network: Network
    images: int

    def __post_init__(self) -> None:
        """Refuse what no model can have."""
        if self.classes < 2:
            raise ValueError(f"expected classes >= 2, got {self.classes}")
        for name in ("image_size", "channels", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.network not in get_args(Network):
            raise ValueError(f"expected network in {get_args(Network)}, got {self.network!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def describe_model(model: nn.Module, images: Tensor, *, classes: int | None = None) -> ModelInfo:
    """What a calibration asks about a model, read off its layers and the images.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``.
        images: The clean float32 ``(N, C, H, W)`` in [0, 1] of the scan.
        classes: K, if known; otherwise one image is classified.

    Raises:
        ValueError: Bad images, or answers that are no logits.
    """
    check_images(images)
    if classes is None:
        classes = predict(model, images[:1]).shape[1]
    # A compiled module has lost its class, yet knows its name.
    names = [str(getattr(m, "original_name", type(m).__name__)) for m in model.modules()]
    network: Network = "other"
    if any(_ATTENTION.search(name) for name in names):
        network = "transformer"
    elif any(_CONVOLUTION.search(name) for name in names):
        network = "convolutional"
    return ModelInfo(classes, max(images.shape[2:]), images.shape[1], network, len(images))
