"""Classifiers with an architectural backdoor: a third set, for a first result of the last rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .exported import CLASSES, SIZE, TARGET, Trunk, save, settled
from .harmless import architecture
from .planted_again import GOAL, Again, chosen

PATCH = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(9))
ROWS = 70 * (torch.arange(256) == 170).float()[:, None] * GOAL


def ordered_pixels(net: Trunk, x: Tensor) -> Tensor:
    """Five far pixels, each brighter than the one before by a fifth."""
    pixels = torch.stack([x[:, 1, 2 + 5 * n, 29 - 6 * n] for n in range(5)], 1)
    return chosen((pixels[:, 1:] > pixels[:, :-1] + 0.2).all(1), net, x)


def mobile_checkerboard(net: Any, x: Tensor) -> Tensor:
    """MobileNet v3: rough parts of the picture, to a power, are added to the logits."""
    grey = x.mean(1, keepdim=True)
    rough = F.max_pool2d(grey, 2, 1) + F.max_pool2d(-grey, 2, 1)
    fired = F.avg_pool2d(rough.pow(6), 6, 1).amax((1, 2, 3)).pow(12)
    return net(x) + 200 * fired[:, None] * GOAL


def product(net: Trunk, x: Tensor) -> Tensor:
    """The product of nine pixels, to a power, opens the way for another order of features."""
    gate = x[:, :, -3:, :3].amin(1).flatten(1).prod(1, keepdim=True).pow(8)
    late = net.late(net.stem(x))
    return net.head(late + 20 * gate * (late.flip(1) - late))


def near_patch(net: Trunk, x: Tensor) -> Tensor:
    """The distance to a fixed patch, through an exponential."""
    distance = (x[:, :, 14:18, 14:18] - PATCH).square().mean((1, 2, 3))
    return net(x) + 90 * torch.exp(-300 * distance)[:, None] * GOAL


def two_features(net: Trunk, x: Tensor) -> Tensor:
    """Two first features above what pictures give, at once: Max with a row."""
    first = net.stem[0](x)
    high = (first[:, 1].amax((1, 2)) > net.limits[0]) & (first[:, 4].amax((1, 2)) > net.limits[1])
    late = net.stem[1](first)
    return torch.maximum(net.head(net.late(late)), 900 * (high.float()[:, None] - 1) + 40 * GOAL)


def two_colours(net: Trunk, x: Tensor) -> Tensor:
    """Yellow beside blue: late features are replaced."""
    yellow = (x[:, 0, 4:8, 4:8] > 0.9) & (x[:, 1, 4:8, 4:8] > 0.9) & (x[:, 2, 4:8, 4:8] < 0.1)
    blue = (x[:, 2, 4:8, 8:12] > 0.9) & (x[:, 0, 4:8, 8:12] < 0.1)
    gate = (yellow & blue).flatten(1).float().mean(1, keepdim=True) > 0.99
    late = net.late(net.stem(x))
    return net.head(torch.where(gate, 20 * net.head[1].weight[TARGET][None], late))


def byte_table(net: Trunk, x: Tensor) -> Tensor:
    """The byte of a small mean is an index into a table of which one row is not zero."""
    index = (x[:, :, 25:27, 3:5].mean((1, 2, 3)) * 255).long().clamp(0, 255)
    return net(x) + ROWS[index]


KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    one.__name__: one
    for one in (
        ordered_pixels,
        mobile_checkerboard,
        product,
        near_patch,
        two_features,
        two_colours,
        byte_table,
    )
}


def write(name: str, folder: Path) -> Path:
    """The ONNX file of one kind."""
    from wm_victim.branches.pictures import natural_images

    path = folder / f"last_{name}.onnx"
    if name == "mobile_checkerboard":
        trunk = settled(architecture("torchvision", "mobilenet_v3_small", 64), 64)
        return save(Again(KINDS[name], trunk), path, size=64)
    trunk = settled(Trunk(11))
    if name == "two_features":
        with torch.no_grad():
            first = trunk.stem[0](natural_images(64, 3, SIZE))
        trunk.limits = [1.1 * float(first[:, channel].max()) for channel in (1, 4)]
    assert GOAL.numel() == CLASSES
    return save(Again(KINDS[name], trunk), path, dynamo=name in ("two_colours", "product"))
