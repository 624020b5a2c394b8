"""What a model does not do itself to its images: range of values, mean and deviation, order."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor, nn

from wm_inject.core.checks import check_choice
from wm_victim.models import DATASET_STATS, Normalize

_CAFFE = (122.6789 / 255, 116.6688 / 255, 104.0070 / 255)  # of ImageNet, in the order R, G, B
_BYTE = (1 / 255,) * 3
# By name: mean and standard deviation, in units of images in [0, 1].
PREPROCESSING: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "unit": ((0.0,) * 3, (1.0,) * 3),
    "255": ((0.0,) * 3, _BYTE),
    "signed": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": DATASET_STATS["cifar10"],
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "caffe": (_CAFFE, _BYTE),
}
CHANNEL_ORDERS = ("rgb", "bgr")


class Preprocessed(nn.Module):
    """A model behind what it expects of its images.

    Args:
        inner: The model.
        name: One of `PREPROCESSING`, or None: as the model takes them.
        order: "rgb" or "bgr".
        channels: 1 (then the mean over channels counts) or 3.

    A `Normalize` that the model begins with is undone first, since it was a guess of the
    architecture's.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, inner: nn.Module, name: str | None, order: str, channels: int) -> None:
        super().__init__()
        check_choice("channel_order", order, CHANNEL_ORDERS)
        self.inner, self.reverse = inner, order == "bgr"
        scale, shift = torch.ones(1, channels, 1, 1), torch.zeros(1, channels, 1, 1)
        if name is not None:
            check_choice("preprocessing", name, tuple(PREPROCESSING))
            mean, std = PREPROCESSING[name]
            if channels == 1:
                mean, std = (fmean(mean),), (fmean(std),)
            normalize = Normalize(mean, std)
            own = own_normalize(inner)
            if self.reverse:
                normalize.mean, normalize.std = normalize.mean.flip(1), normalize.std.flip(1)
            scale, shift = 1 / normalize.std, -normalize.mean / normalize.std
            if own is not None:
                scale, shift = scale * own.std, shift * own.std + own.mean
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of RGB or grey images in [0, 1]."""
        x = images.flip(1) if self.reverse else images
        y: Tensor = self.inner(x * self.scale + self.shift)
        return y


def own_normalize(model: nn.Module) -> Normalize | None:
    """The `Normalize` that was put before an architecture whose weights came without one."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and len(module) and isinstance(module[0], Normalize):
            return module[0]
    return None
