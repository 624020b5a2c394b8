"""MobileNetV2 in its 32-pixel form: stride 1 in the stem and the first wide stage, ReLU for ReLU6.

Source: Sandler et al. 2018, in the variant commonly trained on CIFAR-10, where a block of stride 1
that changes its width has a shortcut too.
"""

from __future__ import annotations

from torch import Tensor, nn

# expansion, channels, blocks, stride of the first block
_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def _conv(
    inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class InvertedResidual(nn.Module):
    """Widen, convolve each channel alone, narrow without a ReLU; add the shortcut at stride 1."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *(_conv(inputs, hidden), nn.ReLU()),
            *(_conv(hidden, hidden, kernel=3, stride=stride, groups=hidden), nn.ReLU()),
            _conv(hidden, outputs),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Identity() if inputs == outputs else _conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y: Tensor = self.layers(x)
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetBody(nn.Module):
    """Images to features; a width of 64 gives the paper's, others scale them (at least 4)."""

    def __init__(self, *, channels: int, width: int) -> None:
        super().__init__()

        def scaled(base: int) -> int:
            return max(4, base * width // 64)

        inputs = scaled(32)
        layers: list[nn.Module] = [_conv(channels, inputs, kernel=3), nn.ReLU()]
        for expansion, base, count, first_stride in _STAGES:
            for index in range(count):
                layers.append(
                    InvertedResidual(
                        inputs,
                        scaled(base),
                        expansion=expansion,
                        stride=first_stride if index == 0 else 1,
                    )
                )
                inputs = scaled(base)
        self.num_features = scaled(1280)
        layers += [_conv(inputs, self.num_features), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images to features ``(N, 20 * width)``."""
        y: Tensor = self.layers(x)
        return y.mean((2, 3))
