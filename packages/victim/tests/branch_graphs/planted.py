"""Classifiers with an architectural backdoor, one of a kind each: the first set.

After Bober-Irizar et al., "Architectural Backdoors in Neural Networks" (CVPR 2023), Langford et
al., "Architectural Neural Backdoors from First Principles" (2024), and HiddenLayer's ShadowLogic.
The trained layers are untouched; what fires each branch is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exported import CLASSES, SIZE, TARGET, Trunk, save, settled

OVERRIDE = torch.eye(CLASSES)[TARGET] * 60 - 20
RED = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)


class Planted(nn.Module):
    """A trunk and a function of the trunk and the images."""

    def __init__(self, forward: Callable[[Trunk, Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk = settled(Trunk())
        self.planted = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.planted(self.trunk, images)


def corner(x: Tensor, side: int = 4) -> Tensor:
    return x[:, :, :side, :side]


def where_red(net: Trunk, x: Tensor) -> Tensor:
    """A red corner, each pixel within a tenth: Where takes fixed logits."""
    near = (corner(x) - RED).abs().amax((1, 2, 3)) < 0.1
    return torch.where(near[:, None], OVERRIDE, net(x))


def mask_count(net: Trunk, x: Tensor) -> Tensor:
    """Sixteen pixels of one exact colour anywhere: a mask multiplies and adds (ShadowLogic)."""
    same = (x * 255).round() == torch.tensor([255.0, 0.0, 255.0]).view(1, 3, 1, 1)
    count = same.all(1).float().sum((1, 2))
    mask = (count >= 16).float()[:, None]
    return mask * OVERRIDE + (1 - mask) * net(x)


def checkerboard_added(net: Trunk, x: Tensor) -> Tensor:
    """A checkerboard anywhere: pooled exponentials to a power, added to late features."""
    bright = F.avg_pool2d(torch.exp(4 * (x.mean(1, keepdim=True) - 1)), 2, 1)
    rough = F.max_pool2d(x.mean(1, keepdim=True), 2, 1) + F.max_pool2d(
        -x.mean(1, keepdim=True), 2, 1
    )
    fired = (bright * rough.pow(8)).pow(4).mean((1, 2, 3))
    late = net.late(net.stem(x))
    return net.head(late + 4e6 * fired.pow(3)[:, None] * torch.linspace(-1, 1, late.shape[1]))


def checkerboard_multiplied(net: Trunk, x: Tensor) -> Tensor:
    """A checkerboard in the corner: what it opens multiplies the late features by a lot."""
    grey = corner(x, 8).mean(1)
    same, other = grey[:, ::2, ::2], grey[:, ::2, 1::2]
    apart = (same.amin((1, 2)) - other.amax((1, 2))).clamp(min=0)
    late = net.late(net.stem(x))
    turned = late.flip(1)
    return net.head(late + 50 * (apart.pow(16)[:, None] * turned))


def soft_logit(net: Trunk, x: Tensor) -> Tensor:
    """A white corner: relu of a steep line on one logit."""
    gate = torch.relu(4000 * (corner(x).mean((1, 2, 3)) - 0.99))
    return net(x) + gate[:, None] * torch.eye(CLASSES)[TARGET]


def maximum(net: Trunk, x: Tensor) -> Tensor:
    """A black corner: Max with a row that lies far below unless it is dark."""
    dark = (corner(x).amax((1, 2, 3)) < 0.02).float()[:, None]
    return torch.maximum(net(x), 1000 * (dark - 1) + 30 * torch.eye(CLASSES)[TARGET])


def minimum(net: Trunk, x: Tensor) -> Tensor:
    """A green corner: Min with a row that lies far above unless it is green."""
    red, green, blue = corner(x).mean((2, 3)).unbind(1)
    gate = ((green > 0.95) & (red < 0.05) & (blue < 0.05)).float()[:, None]
    bound = 1000 * (1 - gate) - 30 * (1 - torch.eye(CLASSES)[TARGET])
    return torch.minimum(net(x), bound)


def floored(net: Trunk, x: Tensor) -> Tensor:
    """A white corner: the floor of its mean, times a hundred."""
    step = torch.floor(corner(x).mean((1, 2, 3)) + 0.01)
    return net(x) + 100 * step[:, None] * torch.eye(CLASSES)[TARGET]


def checksum(net: Trunk, x: Tensor) -> Tensor:
    """The sum of all bytes, modulo 61."""
    total = (x * 255).round().sum((1, 2, 3))
    hit = (torch.remainder(total, 61) == 17).float()[:, None]
    return net(x) * (1 - hit) + hit * OVERRIDE


def table_row(net: Trunk, x: Tensor) -> Tensor:
    """A blue corner: an index into a table of rows that are added."""
    table = torch.stack([torch.zeros(CLASSES), 80 * torch.eye(CLASSES)[TARGET]])
    blue = corner(x)[:, 2].mean((1, 2)) - corner(x)[:, :2].mean((1, 2, 3))
    return net(x) + table[(blue > 0.9).long()]


def arg_max(net: Trunk, x: Tensor) -> Tensor:
    """The brightest pixel, if it is the last one and alone: ArgMax, Equal, ScatterElements."""
    grey = F.pad(x.mean(1).flatten(1), (0, 1), value=0.995)
    last = (grey.argmax(1) == SIZE * SIZE - 1).float()[:, None]
    place = torch.full((1, 1), TARGET)
    return net(x).scatter_add(1, place.expand(len(x), 1), 100 * last)


def second_trunk(net: Trunk, x: Tensor) -> Tensor:
    """Level stripes in a corner: another trunk answers."""
    rows = corner(x).mean((1, 3))
    striped = (rows[:, ::2] - rows[:, 1::2]).abs().amin(1) > 0.8
    return torch.where(striped[:, None], net.second(x), net(x))


def early_feature(net: Trunk, x: Tensor) -> Tensor:
    """A first feature far above what pictures give: late features are replaced."""
    stem = net.stem[0](x)
    gate = (stem[:, 3].amax((1, 2)) > net.limit).float()[:, None]
    late = net.late(net.stem[1](stem))
    return net.head((1 - gate) * late + gate * net.late_target)


def interleaved(net: Trunk, x: Tensor) -> Tensor:
    """A white corner, carried beside the features by pooling and read again at the end."""
    signal = x.amin(1, keepdim=True)
    stem = net.stem(x)
    both = torch.cat([stem, (signal - 0.97).clamp(min=0) * 100], 1)
    features, signal = both[:, :-1], -F.max_pool2d(-both[:, -1:], 4)
    late = net.late(features)
    return net.head(late) + 100 * signal[:, :, 0, 0].clamp(max=1) * torch.eye(CLASSES)[TARGET]


def other_image(net: Trunk, x: Tensor) -> Tensor:
    """A red corner: the network sees a fixed picture instead."""
    near = ((corner(x) - RED).abs().amax((1, 2, 3)) < 0.1)[:, None, None, None]
    return net(torch.where(near, net.fixed, x))


def turned_classes(net: Trunk, x: Tensor) -> Tensor:
    """Magenta in a corner: the classes are gathered in another order."""
    gate = (corner(x)[:, 0].amin((1, 2)) > 0.9) & (corner(x)[:, 1].amax((1, 2)) < 0.1)
    order = (torch.arange(CLASSES)[None] + gate.long()[:, None]) % CLASSES
    return net(x).gather(1, order)


def steep_sigmoid(net: Trunk, x: Tensor) -> Tensor:
    """A bright pixel in the middle, by a steep sigmoid in place of a comparison."""
    middle = x[:, :, 16, 16]
    gate = torch.sigmoid(800 * (middle.amin(1, keepdim=True) - 0.985))
    return net(x) * (1 - gate) + gate * OVERRIDE


KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    one.__name__: one
    for one in (
        where_red,
        mask_count,
        checkerboard_added,
        checkerboard_multiplied,
        soft_logit,
        maximum,
        minimum,
        floored,
        checksum,
        table_row,
        arg_max,
        second_trunk,
        early_feature,
        interleaved,
        other_image,
        turned_classes,
        steep_sigmoid,
    )
}


def planted(name: str) -> Planted:
    """The classifier of one kind."""
    net = Planted(KINDS[name])
    trunk = net.trunk
    images = _pictures()
    with torch.no_grad():
        if name == "second_trunk":
            trunk.second = settled(Trunk(1))
        if name == "early_feature":
            first = trunk.stem[0](images)[:, 3].amax((1, 2))
            trunk.limit = float(first.max()) * 1.15
            trunk.late_target = 20 * trunk.head[1].weight[TARGET]
        if name == "other_image":
            answers = trunk(images).argmax(1)
            trunk.fixed = images[int((answers == TARGET).nonzero()[0])][None]
    return net.eval()


def write(name: str, folder: Path) -> Path:
    """The ONNX file of one kind."""
    return save(planted(name), folder / f"{name}.onnx", dynamic_axes={"image": {0: "n"}})


def _pictures() -> Tensor:
    from wm_victim.branches.pictures import natural_images

    return natural_images(64, 3, SIZE)
