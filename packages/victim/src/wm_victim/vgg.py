"""VGG-16 with batch normalisation and one linear layer: the 32-pixel form.

Source: Simonyan and Zisserman 2015, configuration D, as commonly cut down for CIFAR-10.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_LEAST = 32  # five halvings need 32 pixels
_LEAST_PADDED = 28


class VggBody(nn.Module):
    """Images to features ``(N, 8 * width)``: 13 convolutions in five stages with max-pooling.

    Images of 28 .. 31 pixels are padded to 32 by repeating the border. ``width`` is that of the
    first stage (64 in the paper); the others keep their proportion.
    """

    def __init__(self, *, channels: int, image_size: int, width: int) -> None:
        super().__init__()
        if image_size < _LEAST_PADDED:
            raise ValueError(
                f"expected images of at least {_LEAST_PADDED} pixels for vgg16, got {image_size}"
            )
        before = max(0, _LEAST - image_size) // 2
        after = max(0, _LEAST - image_size) - before
        self.padding = [before, after, before, after]
        layers: list[nn.Module] = []
        inputs = channels
        for base, count in _STAGES:
            outputs = base * width // 64
            for _ in range(count):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the last map."""
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        y: Tensor = self.layers(x)
        return y.mean((2, 3))
