"""The small convolutional net that WaNet (Nguyen and Tran 2021) attacks on MNIST."""

from __future__ import annotations

from torch import Tensor, nn


class MnistNetBody(nn.Module):
    """Images to features: three convolutions of stride 2 and one linear layer.

    The paper's text counts more linear layers; its released code, which this follows, has two with
    the classifier's head. A width of 64 gives the published widths 32, 64, 64 and 512.
    """

    def __init__(self, *, channels: int, image_size: int, width: int) -> None:
        super().__init__()
        half = max(1, width // 2)
        side = -(-image_size // 8)  # three halvings, each rounded up
        self.num_features = 8 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, half, 3, 2, 1), nn.ReLU()),
            *(nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, width, 3, 2, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1, bias=False)),
            nn.Flatten(),
            *(nn.Linear(width * side * side, self.num_features), nn.ReLU(), nn.Dropout(0.3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images to features ``(N, 8 * width)``."""
        y: Tensor = self.layers(x)
        return y
