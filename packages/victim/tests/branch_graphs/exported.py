"""Small networks of random weights, and ONNX files of them by both of torch's exporters."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_victim.branches.pictures import natural_images

SIZE, CLASSES, TARGET = 32, 10, 7


class Trunk(nn.Module):
    """Six trained layers, in two halves: features ``(N, 32, 8, 8)``, then logits."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(_block(3, width, 1), _block(width, width, 1))
        self.body = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width, 2))
        self.tail = nn.Sequential(_block(2 * width, 2 * width, 2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width, CLASSES))

    def late(self, features: Tensor) -> Tensor:
        """Features of the stem to the numbers before the head ``(N, 32)``."""
        return self.tail(self.body(features)).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.late(self.stem(images)))


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def settled(net: nn.Module, size: int = SIZE, channels: int = 3) -> nn.Module:
    """A network whose norms and last biases fit pictures, so that it gives all of its labels."""
    images = natural_images(32, channels, size)
    net.train()
    with torch.no_grad():
        for _ in range(30):
            net(images)
        net.eval()
        last = [each for each in net.modules() if isinstance(each, nn.Linear)][-1]
        logits = net(images)
        scale = 1 / logits.std(0).clamp(min=1e-6)
        if len(scale) == len(last.weight) and last.bias is not None:
            last.weight.mul_(scale[:, None])
            last.bias.copy_((last.bias - logits.mean(0)) * scale)
    return net


def save(
    net: nn.Module,
    path: Path,
    *,
    size: int = SIZE,
    channels: int = 3,
    dynamo: bool = False,
    example: Tensor | None = None,
    **more: Any,
) -> Path:
    """Write a network as ONNX."""
    images = natural_images(1, channels, size) if example is None else example
    if not dynamo:
        more = {"opset_version": 17, **more}
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as silent,
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (images,), str(path), dynamo=dynamo, input_names=["image"], **more
        )
    logging.disable(logging.NOTSET)
    return path
