"""ResNet and pre-activation ResNet in their 32-pixel form: a stem of stride 1 without pooling.

Source: He et al. 2016 (both papers), in the CIFAR variant that the backdoor field uses as victims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["post", "pre"]


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class PostActBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the shortcut, then relu."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _conv(inputs, outputs, kernel=1, stride=stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn-relu-conv-bn-relu-conv, plus the shortcut; a widening shortcut reads the first relu."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        widens = stride != 1 or inputs != outputs
        self.shortcut = _conv(inputs, outputs, kernel=1, stride=stride) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class ResNetBody(nn.Module):
    """Images to features.

    Args:
        form: "post" (ResNet) or "pre" (PreActResNet: nothing in the stem after the convolution,
            and no normalisation before the pooling either).
        blocks: Blocks in each of the four stages.
        channels: 1 or 3.
        width: Channels of the first stage; every stage doubles them.
    """

    def __init__(self, *, form: Form, blocks: Sequence[int], channels: int, width: int) -> None:
        super().__init__()
        stem: list[nn.Module] = [_conv(channels, width)]
        if form == "post":
            stem += [nn.BatchNorm2d(width), nn.ReLU()]
        block = PostActBlock if form == "post" else PreActBlock
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(block(inputs, outputs, stride))
                inputs = outputs
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*stages)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Images to ``(N, 8 * width)``: the mean over the last map, whatever its size."""
        y: Tensor = self.blocks(self.stem(x))
        return y.mean((2, 3))
