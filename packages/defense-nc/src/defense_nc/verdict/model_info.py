"""Properties of a scanned model, to compare it with those of a calibration."""

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
    """Classes, images and kind of network of one scanned model."""

    classes: int  # >= 2
    image_size: int  # the longer side in pixels
    channels: int
    network: Network  # "transformer" with attention anywhere in it
    images: int  # clean images that the scan used

    def __post_init__(self) -> None:
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
    """Read the properties off a model's layers and the scan's images.

    Args:
        model: Not run if ``classes`` is given.
        images: Of the scan.
        classes: K, if known.

    Raises:
        ValueError: Bad images, or outputs that are no logits.
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
