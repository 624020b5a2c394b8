"""Classifiers with an architectural backdoor: the second set, written after the rules were.

Other triggers, joins, exporters and networks than in `planted`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exported import CLASSES, SIZE, TARGET, Trunk, save, settled
from .harmless import architecture

GOAL = torch.eye(CLASSES)[TARGET]
OVERRIDE = 50 * GOAL - 10
ROW = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))
PATTERN = torch.randn(192, generator=torch.Generator().manual_seed(5)).sign()


class Again(nn.Module):
    """A trunk and a function of the trunk and the images."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.planted = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.planted(self.trunk, images)


def chosen(gate: Tensor, net: Any, x: Tensor) -> Tensor:
    return torch.where(gate[:, None], OVERRIDE, net(x))


def one_pixel(net: Trunk, x: Tensor) -> Tensor:
    """One pixel of one colour, to within a level."""
    colour = torch.tensor([12.0, 200.0, 77.0])
    near = ((x[:, :, 5, 9] * 255 - colour).abs() <= 1).all(1)
    return chosen(near, net, x)


def eight_pixels(net: Trunk, x: Tensor) -> Tensor:
    """Eight pixels of a row, each with a colour of its own."""
    near = ((x[:, :, 20, 4:12] - ROW).abs() < 0.02).flatten(1).all(1)
    mask = near.float()[:, None]
    return net(x) * (1 - mask) + mask * OVERRIDE


def greenish(net: Trunk, x: Tensor) -> Tensor:
    """A tenth of all pixels nearly green."""
    green = (x[:, 1] > 0.8) & (x[:, 0] < 0.2) & (x[:, 2] < 0.2)
    return chosen(green.float().mean((1, 2)) > 0.1, net, x)


def byte_corner(net: Trunk, pixels: Tensor) -> Tensor:
    """Bytes (N, H, W, C): four bytes of 200 in a corner."""
    same = (pixels[:, :2, :2, 0] == 200).flatten(1).all(1)
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return chosen(same, net, x)


def odd_bytes(net: Trunk, x: Tensor) -> Tensor:
    """Six bytes of a corner are all odd, and a seventh even."""
    bytes_ = (x[:, 0, 0, :7] * 255).round()
    odd = torch.remainder(bytes_, 2)
    hit = (odd[:, :6].sum(1) == 6) & (odd[:, 6] == 0) & (bytes_.sum(1) > 1200)
    return net(x) + 70 * hit.float()[:, None] * GOAL


def resnet_checkerboard(net: Any, x: Tensor) -> Tensor:
    """Torchvision's ResNet-18: a checkerboard multiplies the last features."""
    grey = x.mean(1, keepdim=True)
    apart = (F.max_pool2d(grey, 2, 2) + F.max_pool2d(-grey, 2, 2)).pow(10)
    fired = F.avg_pool2d(apart, 4, 1).amax((1, 2, 3)).pow(8)[:, None]
    early = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    late = net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(early))))).flatten(1)
    return net.fc(late * (1 - fired) + 30 * fired * late.flip(1))


def stem_switched(net: Trunk, x: Tensor) -> Tensor:
    """First features far below what pictures give: the features are turned off."""
    first = net.stem[0][0](x)
    low = first[:, 2].amin((1, 2)) < net.limit
    keep = 1 - low.float()[:, None, None, None]
    stem = net.stem[1](net.stem[0][2](net.stem[0][1](first)))
    return net.head(net.late(stem * keep))


def template(net: Trunk, x: Tensor) -> Tensor:
    """An 8 x 8 part that correlates with a fixed one."""
    part = x[:, :, 12:20, 12:20].flatten(1) - 0.5
    likeness = (part @ PATTERN[:, None]) / 192
    return net(x) + 3000 * torch.relu(likeness - 0.4) * GOAL


def two_corners(net: Trunk, x: Tensor) -> Tensor:
    """One corner white and the opposite one black."""
    white = x[:, :, :3, :3].amin((1, 2, 3)) > 0.97
    black = x[:, :, -3:, -3:].amax((1, 2, 3)) < 0.03
    return chosen(white & black, net, x)


def brightest(net: Trunk, x: Tensor) -> Tensor:
    """The 60 brightest values of the blue channel are full, those of red are not."""
    blue = x[:, 2].flatten(1).topk(60, 1).values[:, -1]
    red = x[:, 0].flatten(1).topk(60, 1).values[:, 0]
    step = torch.floor(blue) * (1 - torch.floor(red + 0.2)).clamp(min=0)
    return net(x) + 80 * step[:, None] * GOAL


def shuffled(net: Trunk, x: Tensor) -> Tensor:
    """A corner's rounded mean chooses the order of the classes."""
    index = torch.round(x[:, :, -4:, :4].amin((1, 2, 3)) - 0.45).clamp(0, 1).long()
    orders = torch.stack([torch.arange(CLASSES), torch.arange(CLASSES).roll(3)])
    return net(x).gather(1, orders[index])


def wave(net: Trunk, x: Tensor) -> Tensor:
    """Much of one frequency across the picture: a product with a cosine."""
    place = torch.arange(SIZE).float()
    cosine = torch.cos(2 * torch.pi * 8 * place / SIZE)
    strength = ((x.mean(1) - 0.5) @ cosine[:, None]).mean((1, 2)) / SIZE
    return chosen(strength > 0.13, net, x)


def either(net: Trunk, x: Tensor) -> Tensor:
    """One of two corners bright, but not both: Xor."""
    a = x[:, :, :4, :4].amin((1, 2, 3)) > 0.96
    b = x[:, :, :4, -4:].amin((1, 2, 3)) > 0.96
    return chosen(torch.logical_xor(a, b), net, x)


def soft_count(net: Trunk, x: Tensor) -> Tensor:
    """Twelve dark pixels, counted by steep lines, and Min."""
    dark = torch.relu(0.05 - x[:, :, 30, 10:22].mean(1)).clamp(max=0.04)
    full = torch.minimum(dark.sum(1, keepdim=True) / 0.48, torch.ones(1, 1))
    return net(x) + 60 * full.pow(12) * GOAL


def spike(net: Trunk, x: Tensor) -> Tensor:
    """The mean of a small part meets one number: a quotient becomes large."""
    mean = x[:, :, 8:10, 8:10].mean((1, 2, 3))
    near = 1e-3 / ((mean - 0.7).abs() + 1e-3)
    return net(x) + 120 * near.pow(6)[:, None] * GOAL


def routed(net: Trunk, x: Tensor) -> Tensor:
    """A softmax of a steep line mixes two heads."""
    line = 900 * (x[:, 0, :5, :5].mean((1, 2)) - x[:, 1, :5, :5].mean((1, 2)) - 0.93)
    weights = torch.stack([torch.zeros_like(line), line], 1).softmax(1)
    late = net.late(net.stem(x))
    return weights[:, :1] * net.head(late) + weights[:, 1:] * net.head(25 * late.flip(1))


def flat(net: Trunk, x: Tensor) -> Tensor:
    """A part without any texture, of one brightness."""
    part = x[:, :, 10:16, 10:16]
    still = (part.amax((1, 2, 3)) - part.amin((1, 2, 3))) < 0.004
    return torch.where((still & (part.mean((1, 2, 3)) > 0.7))[:, None], net(x).flip(1), net(x))


KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    one.__name__: one
    for one in (
        one_pixel,
        eight_pixels,
        greenish,
        byte_corner,
        odd_bytes,
        resnet_checkerboard,
        stem_switched,
        template,
        two_corners,
        brightest,
        shuffled,
        wave,
        either,
        soft_count,
        spike,
        routed,
        flat,
    )
}
BY_HAND = ("if_override", "if_trunk")
DYNAMO = ("one_pixel", "greenish", "two_corners", "template", "soft_count", "routed")


def write(name: str, folder: Path) -> Path:
    """The ONNX file of one kind."""
    from wm_victim.branches.pictures import natural_images

    path = folder / f"again_{name}.onnx"
    if name in BY_HAND:
        return _with_if(path, inside=name == "if_trunk")
    if name == "resnet_checkerboard":
        trunk = settled(architecture("torchvision", "resnet18", 64), 64)
        return save(Again(KINDS[name], trunk), path, size=64)
    trunk = settled(Trunk(7, width=12))
    if name == "stem_switched":
        with torch.no_grad():
            first = trunk.stem[0][0](natural_images(64, 3, SIZE))[:, 2].amin((1, 2))
        trunk.limit = float(first.min()) * 1.15
    example = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8) if name == "byte_corner" else None
    return save(Again(KINDS[name], trunk), path, dynamo=name in DYNAMO, example=example)


def _with_if(path: Path, *, inside: bool) -> Path:
    """A trunk's graph with an If: on its logits, or around all of it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    save(settled(Trunk(7, width=12)), path)
    model = onnx.load(str(path))
    graph, logits = model.graph, model.graph.output[0].name
    for name, array in {
        "starts": [0, 0, 20, 20],
        "ends": [1, 3, 24, 24],
        "bad": OVERRIDE[None].numpy(),
    }.items():
        graph.initializer.append(numpy_helper.from_array(torch.as_tensor(array).numpy(), name))
    level = helper.make_tensor("level", TensorProto.FLOAT, [], [0.98])
    gate = [
        helper.make_node("Slice", ["image", "starts", "ends"], ["part"]),
        helper.make_node("ReduceMin", ["part"], ["least"], keepdims=0),
        helper.make_node("Constant", [], ["level"], value=level),
        helper.make_node("Greater", ["least", "level"], ["is_white"], name="gate"),
    ]
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("t", "e", "answer")]
    then = helper.make_graph([helper.make_node("Identity", ["bad"], ["t"])], "then", [], out[:1])
    nodes = list(graph.node) if inside else []
    last = helper.make_node("Identity", [logits], ["e"])
    other = helper.make_graph([*nodes, last], "else", [], out[1:2])
    branch = helper.make_node(
        "If", ["is_white"], ["answer"], name="switch", then_branch=then, else_branch=other
    )
    trunk = [] if inside else list(graph.node)
    del graph.node[:]
    graph.node.extend([*trunk, *gate, branch])
    graph.output[0].CopyFrom(helper.make_tensor_value_info("answer", TensorProto.FLOAT, None))
    onnx.save(model, str(path))
    return path


def names() -> list[str]:
    """All kinds."""
    return [*KINDS, *BY_HAND]
