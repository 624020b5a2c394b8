"""The network of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds"), 1.97 M parameters.

A frozen whitening convolution, three groups of two convolutions, early pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHITEN_EPOCHS = 3  # the bias of the whitening layer is trained so long
_PATCH = 2
_IMAGES = 5000  # training images that the whitening is computed from
_RIDGE = 5e-4  # added to the eigenvalues
_HEAD_SCALE = 1 / 9


class ShiftNorm(nn.BatchNorm2d):
    """Batch normalisation whose scale stays 1; its bias is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3 x 3, whose first filters hand the inputs through."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:inputs])
    return conv


class AirbenchBody(nn.Module):
    """Images to features.

    Args:
        channels: 1 or 3.
        image_size: H = W, at least 25: three poolings by 2 and one by 3.
        width: Channels of the first group; the others have four times as many.
    """

    def __init__(self, *, channels: int, image_size: int, width: int) -> None:
        super().__init__()
        if image_size < 25:
            raise ValueError(f"expected image_size of at least 25 for airbench, got {image_size}")
        filters = 2 * channels * _PATCH**2
        self.whiten = nn.Conv2d(channels, filters, _PATCH)
        self.whiten.weight.requires_grad_(False)
        layers: list[nn.Module] = []
        inputs = filters
        for outputs in (width, 4 * width, 4 * width):
            layers += [_conv(inputs, outputs), nn.MaxPool2d(2), ShiftNorm(outputs), nn.GELU()]
            layers += [_conv(outputs, outputs), ShiftNorm(outputs), nn.GELU()]
            inputs = outputs
        self.groups = nn.Sequential(*layers)
        self.num_features = inputs * (((image_size - 1) // 8) // 3) ** 2

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Set the first layer from normalised training images ``(N, C, H, W)``.

        Its filters are the eigenvectors of the patches' second moments, divided by the root of
        their eigenvalues, and the same with the other sign.
        """
        patches = F.unfold(images[:_IMAGES].float(), _PATCH).transpose(1, 2).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + _RIDGE).sqrt()).T.view(-1, images.shape[1], _PATCH, _PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Images to ``(N, num_features)``, scaled down so that logits start small."""
        y: Tensor = self.groups(F.gelu(self.whiten(x)))
        return F.max_pool2d(y, 3).flatten(1) * _HEAD_SCALE
