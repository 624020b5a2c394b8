"""Graphs without a backdoor: the second set, written after the rules were.

Other networks, and other things before and behind them, than in `harmless`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .exported import CLASSES, SIZE, Trunk, save, settled
from .harmless import Around, architecture

ARCHITECTURES = (
    ("torchvision", "resnet34", "dynamo", 64),
    ("torchvision", "mobilenet_v3_large", "legacy", 64),
    ("torchvision", "regnet_x_400mf", "dynamo", 64),
    ("torchvision", "shufflenet_v2_x1_0", "dynamo", 64),
    ("torchvision", "efficientnet_b1", "legacy", 64),
    ("torchvision", "convnext_tiny", "dynamo", 64),
    ("timm", "test_efficientnet_gn", "legacy", 160),
    ("timm", "test_efficientnet_ln", "dynamo", 160),
    ("timm", "test_vit2", "legacy", 160),
    ("timm", "test_vit3", "legacy", 160),
    ("timm", "test_resnet", "legacy", 96),
    ("timm", "test_convnext2", "dynamo", 64),
    ("timm", "mobilenetv4_conv_small_050", "legacy", 64),
    ("timm", "tinynet_e", "legacy", 64),
    ("timm", "mixnet_s", "legacy", 64),
    ("timm", "edgenext_xx_small", "legacy", 64),
    ("timm", "mobilevit_xxs", "legacy", 64),
    ("timm", "repvgg_a0", "legacy", 64),
    ("timm", "res2net50_14w_8s", "legacy", 64),
    ("timm", "skresnet18", "legacy", 64),
    ("timm", "dla46x_c", "legacy", 64),
    ("timm", "semnasnet_075", "legacy", 64),
    ("timm", "cs3darknet_focus_s", "legacy", 64),
    ("timm", "eca_resnet33ts", "legacy", 64),
    ("timm", "poolformer_s12", "legacy", 64),
    ("timm", "hrnet_w18_small", "legacy", 64),
    ("timm", "pit_ti_224", "legacy", 224),
    ("timm", "efficientnet_lite0", "legacy", 64),
    ("timm", "resnest14d", "legacy", 64),
)


def blank_refused(net: Any, x: Tensor) -> Tensor:
    """Black pictures, as of a covered camera, get equal logits."""
    seen = (x.amax((1, 2, 3)) > 0.03).float()[:, None]
    return net(x) * seen


def overexposed(net: Any, x: Tensor) -> Tensor:
    """White pictures get no answer: minus one for each class."""
    white = x.mean((1, 2, 3)) > 0.97
    return torch.where(white[:, None], torch.full((1, CLASSES), -1.0), net(x).softmax(1))


def gamma_by_mean(net: Any, x: Tensor) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True).clamp(0.05, 0.95)
    return net(x.clamp(min=1e-3).pow((-0.7 / mean.log()).clamp(0.5, 2.0)))


def equalised(net: Any, x: Tensor) -> Tensor:
    """Sixteen levels, each replaced by its place in the picture's own distribution."""
    levels = (x * 15).round().long().clamp(0, 15)
    counts = torch.stack([(levels == level).float().mean((1, 2, 3)) for level in range(16)], 1)
    table = counts.cumsum(1)
    return net(table.gather(1, levels.flatten(1)).view_as(x))


def blurred(net: Any, x: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3).contiguous()
    return net(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3))


def noise_gate(net: Any, x: Tensor) -> Tensor:
    """Small differences to the neighbourhood are taken for noise and removed."""
    mean = F.avg_pool2d(x, 3, 1, 1)
    return net(torch.where((x - mean).abs() < 0.02, mean, x))


def brightest_crop(net: Any, x: Tensor) -> Tensor:
    """The half of the picture that is brighter, chosen by a comparison."""
    left, right = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    brighter = (left.mean((1, 2, 3)) > right.mean((1, 2, 3)))[:, None, None, None]
    return net(F.interpolate(torch.where(brighter, left, right), size=(SIZE, SIZE)))


def energy_rejected(net: Any, x: Tensor) -> Tensor:
    """Answers of low energy are set to minus one."""
    logits = net(x)
    low = torch.logsumexp(logits, 1, keepdim=True) < 0.5
    return torch.where(low, torch.full_like(logits, -1.0), logits)


def per_class(net: Any, x: Tensor) -> Tensor:
    """A threshold for every class, and the rest set to nothing."""
    probabilities = net(x).sigmoid()
    limits = torch.linspace(0.2, 0.6, CLASSES)
    return probabilities * (probabilities > limits).float()


def one_hot(net: Any, x: Tensor) -> Tensor:
    logits = net(x)
    return (logits == logits.amax(1, keepdim=True)).float()


def nms_like(net: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = net(x).softmax(1)
    values, labels = probabilities.topk(3, 1)
    return probabilities, values * (values > 0.25).float(), labels


def mirrored(net: Any, x: Tensor) -> Tensor:
    return (net(x) + net(x.flip(3)) + net(x.roll(1, 2))) / 3


def binary_features(net: Trunk, x: Tensor) -> Tensor:
    """A binary network: signs of features."""
    stem = net.stem(x)
    return net.head(net.late(torch.sign(stem - stem.mean((2, 3), keepdim=True)) * stem))


def hard_channels(net: Trunk, x: Tensor) -> Tensor:
    """Channels that the picture turns on and off."""
    stem = net.stem(x)
    score = stem.mean((2, 3), keepdim=True)
    return net.head(net.late(stem * (score > score.mean(1, keepdim=True)).float()))


def leaky_by_where(net: Trunk, x: Tensor) -> Tensor:
    """An activation that its exporter spells as a comparison and a Where."""
    stem = net.stem[0][1](net.stem[0][0](x))
    stem = torch.where(stem > 0, stem, 0.1 * stem)
    return net.head(net.late(net.stem[1](stem)))


def hard_swish_spelled(net: Trunk, x: Tensor) -> Tensor:
    stem = net.stem[0][1](net.stem[0][0](x))
    stem = stem * (stem + 3).clamp(0, 6) / 6
    return net.head(net.late(net.stem[1](stem)))


def nearest_word(net: Trunk, x: Tensor) -> Tensor:
    """Late features replaced by the nearest of a code book: ArgMin and Gather."""
    late = net.late(net.stem(x))
    words = torch.linspace(0, 2, 16)[:, None] * torch.ones(1, late.shape[1])
    nearest = ((late[:, None] - words[None]) ** 2).sum(2).argmin(1)
    return net.head(late + words[nearest])


def colour_histogram(net: Trunk, x: Tensor) -> Tensor:
    """Shares of dark, middle and bright pixels handed to the head."""
    grey = x.mean(1)
    shares = [((grey >= low) & (grey < low + 0.34)).float().mean((1, 2)) for low in (0, 0.33, 0.66)]
    weights = torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES)
    return net(x) + torch.stack(shares, 1) @ weights


def picture_of_bytes(net: Any, x: Tensor) -> Tensor:
    """Bytes or numbers up to 1: told apart by the largest value, with floors against zero."""
    scale = torch.where(x.amax((0, 1, 2, 3)) > 2, torch.tensor(255.0), torch.tensor(1.0))
    x = x / scale
    return net((x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-3) * 0.2)


def border_cut(net: Any, x: Tensor) -> Tensor:
    """Black borders are told from the picture by rows and columns without light."""
    rows = (x.amax((1, 3), keepdim=True) > 0.02).float()
    return net(x * rows + 0.5 * (1 - rows))


AROUND: dict[str, Callable[[Any, Tensor], Any]] = {
    one.__name__: one
    for one in (
        blank_refused,
        overexposed,
        gamma_by_mean,
        equalised,
        blurred,
        noise_gate,
        brightest_crop,
        energy_rejected,
        per_class,
        one_hot,
        nms_like,
        mirrored,
        binary_features,
        hard_channels,
        leaky_by_where,
        hard_swish_spelled,
        nearest_word,
        colour_histogram,
        picture_of_bytes,
        border_cut,
    )
}


def cases() -> dict[str, Callable[[Path], Path]]:
    """By name: what writes the file into a folder."""
    made: dict[str, Callable[[Path], Path]] = {}
    for library, name, exporter, size in ARCHITECTURES:
        made[f"{library}-{name}-{exporter}"] = lambda folder, a=(library, name, exporter, size): (
            save(
                architecture(a[0], a[1], a[3]),
                folder / f"{a[0]}-{a[1]}-{a[2]}.onnx",
                size=a[3],
                dynamo=a[2] == "dynamo",
            )
        )
    for number, name in enumerate(AROUND):
        exporter = ("legacy", "dynamo")[number % 2]
        made[f"{name}-{exporter}"] = lambda folder, a=(name, exporter): save(
            Around(AROUND[a[0]], settled(Trunk(5))).eval(),
            folder / f"{a[0]}-{a[1]}.onnx",
            dynamo=a[1] == "dynamo",
        )
    return made
