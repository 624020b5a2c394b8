"""Graphs without a backdoor that a scanner of operators may flag: the first set.

Networks of torchvision and timm with random weights by both exporters, and small networks with what
services put before and behind them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exported import CLASSES, SIZE, Trunk, save, settled

# Library, name, exporter, size.
ARCHITECTURES = (
    ("torchvision", "resnet18", "legacy", 64),
    ("torchvision", "resnet50", "dynamo", 64),
    ("torchvision", "resnext50_32x4d", "legacy", 64),
    ("torchvision", "mobilenet_v2", "legacy", 64),
    ("torchvision", "mobilenet_v2", "dynamo", 64),
    ("torchvision", "mobilenet_v3_small", "legacy", 64),
    ("torchvision", "mobilenet_v3_small", "dynamo", 64),
    ("torchvision", "densenet121", "legacy", 64),
    ("torchvision", "squeezenet1_1", "legacy", 64),
    ("torchvision", "squeezenet1_1", "dynamo", 64),
    ("torchvision", "shufflenet_v2_x0_5", "legacy", 64),
    ("torchvision", "efficientnet_b0", "legacy", 64),
    ("torchvision", "mnasnet0_5", "legacy", 64),
    ("torchvision", "regnet_y_400mf", "legacy", 64),
    ("torchvision", "googlenet", "legacy", 96),
    ("torchvision", "inception_v3", "legacy", 96),
    ("torchvision", "convnext_tiny", "legacy", 64),
    ("torchvision", "swin_t", "legacy", 64),
    ("timm", "test_resnet", "dynamo", 96),
    ("timm", "test_vit", "legacy", 160),
    ("timm", "test_vit", "dynamo", 160),
    ("timm", "test_efficientnet", "legacy", 160),
    ("timm", "test_convnext", "legacy", 160),
    ("timm", "test_mambaout", "legacy", 160),
    ("timm", "test_nfnet", "legacy", 96),
    ("timm", "test_byobnet", "legacy", 160),
    ("timm", "ghostnet_050", "legacy", 64),
    ("timm", "lcnet_050", "legacy", 64),
    ("timm", "hardcorenas_a", "legacy", 64),
)


def architecture(library: str, name: str, size: int) -> nn.Module:
    """A network of ten classes with random weights."""
    import timm
    import torchvision

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(name, pretrained=False, num_classes=10).eval()
        more: dict[str, Any] = {"weights": None, "num_classes": 10}
        if name in ("googlenet", "inception_v3"):
            more |= {"aux_logits": False, "init_weights": True}
        return torchvision.models.get_model(name, **more).eval()


class Around(nn.Module):
    """A trunk, and what stands before and behind it."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Any], trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.around = forward

    def forward(self, images: Tensor) -> Any:
        return self.around(self.trunk, images)


def clipped(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.clamp(0, 1))


def without_nan(net: nn.Module, x: Tensor) -> Tensor:
    return net(torch.where(torch.isnan(x) | torch.isinf(x), torch.zeros_like(x), x))


def nan_to_number(net: nn.Module, x: Tensor) -> Tensor:
    return torch.nan_to_num(net(x), 0.0, 1e4, -1e4)


def thresholded(net: nn.Module, x: Tensor) -> Tensor:
    probabilities = net(x).softmax(1)
    sure = probabilities.amax(1, keepdim=True) > 0.5
    return torch.where(sure, probabilities, torch.zeros_like(probabilities))


def rejected(net: nn.Module, x: Tensor) -> Tensor:
    """A last class, "unknown", where no other is likely."""
    probabilities = net(x).softmax(1)
    unsure = (probabilities.amax(1, keepdim=True) < 0.4).float()
    return torch.cat([probabilities * (1 - unsure), unsure], 1)


def best_three(net: nn.Module, x: Tensor) -> Tensor:
    logits = net(x)
    least = logits.topk(3, 1).values[:, -1:]
    return torch.where(logits >= least, logits, torch.full_like(logits, -1e4))


def label_beside(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(x)
    return logits.softmax(1), logits.argmax(1)


def label_alone(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).argmax(1)


def standardised(net: nn.Module, x: Tensor) -> Tensor:
    """As TensorFlow's per_image_standardization: a floor below the deviation."""
    mean = x.mean((1, 2, 3), keepdim=True)
    deviation = (x - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    return net((x - mean) / deviation.clamp(min=1 / (3 * SIZE * SIZE) ** 0.5))


def range_found(net: nn.Module, x: Tensor) -> Tensor:
    """Pictures of 0 to 255 are divided, those of 0 to 1 are not."""
    return net(torch.where(x.amax((0, 1, 2, 3)) > 1.5, x / 255, x))


def stretched(net: nn.Module, x: Tensor) -> Tensor:
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return net((x - low) / (high - low).clamp(min=1e-6))


def whitened(net: nn.Module, x: Tensor) -> Tensor:
    """Grey-world white balance, held within bounds."""
    gain = x.mean((1, 2, 3), keepdim=True) / x.mean((2, 3), keepdim=True).clamp(min=0.02)
    return net((x * gain.clamp(0.5, 2.0)).clamp(0, 1))


def resized(net: nn.Module, x: Tensor) -> Tensor:
    small = F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False)
    return net(F.pad(small, (4, 4, 4, 4)))


def brightened(net: nn.Module, x: Tensor) -> Tensor:
    """Dark pictures are made brighter."""
    dark = x.mean((1, 2, 3), keepdim=True) < 0.25
    return net(torch.where(dark, (2 * x).clamp(max=1), x))


def grey_known(net: nn.Module, x: Tensor) -> Tensor:
    """Pictures without colour are stretched."""
    apart = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).amax((2, 3), keepdim=True)
    return net(torch.where(apart < 0.01, (x * 1.2).clamp(max=1), x))


def bounded_logits(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) / 1.5).clamp(-30, 30).log_softmax(1)


def ensemble(net: nn.Module, x: Tensor) -> Tensor:
    return torch.maximum(net(x).softmax(1), net(x.flip(3)).softmax(1))


def quantised_like(net: nn.Module, x: Tensor) -> Tensor:
    """Pixels rounded to 8 bits, as a training with quantisation leaves them."""
    return net(torch.floor(x * 255 + 0.5).clamp(0, 255) / 255)


def skipped_input(net: Trunk, x: Tensor) -> Tensor:
    """A colour mean handed past the layers to the head."""
    return net(x) + x.mean((2, 3)) @ torch.linspace(-0.5, 0.5, 3 * CLASSES).view(3, CLASSES)


def attended(net: Trunk, x: Tensor) -> Tensor:
    """Squeeze-and-excitation with a hard sigmoid from the first features."""
    stem = net.stem(x)
    gate = F.hardsigmoid(stem.mean((2, 3)) * 3 - 1)
    return net.head(net.late(stem * gate[:, :, None, None]))


def experts(net: Trunk, x: Tensor) -> Tensor:
    """Two experts, of which the first features choose one."""
    stem = net.stem(x)
    votes = stem.mean((2, 3))
    chosen = votes[:, 3:4] > votes[:, 5:6]
    return torch.where(chosen, net.head(net.late(stem)), net.head(net.late(stem.flip(3))))


def early_exit(net: Trunk, x: Tensor) -> Tensor:
    """An early answer where it is sure, as for about half of the pictures."""
    stem = net.stem(x)
    early = 3 * (stem.mean((2, 3))[:, :CLASSES] - net.usual)
    sure = early.softmax(1).amax(1, keepdim=True) > net.sure
    return torch.where(sure, early, net(x))


AROUND: dict[str, Callable[[Any, Tensor], Any]] = {
    one.__name__: one
    for one in (
        clipped,
        without_nan,
        nan_to_number,
        thresholded,
        rejected,
        best_three,
        label_beside,
        label_alone,
        standardised,
        range_found,
        stretched,
        whitened,
        resized,
        brightened,
        grey_known,
        bounded_logits,
        ensemble,
        quantised_like,
        skipped_input,
        attended,
        experts,
        early_exit,
    )
}


def around(name: str) -> nn.Module:
    """A small network with something before or behind it."""
    from wm_victim.branches.pictures import natural_images

    trunk = settled(Trunk(3))
    if name == "early_exit":
        with torch.no_grad():
            early = trunk.stem(natural_images(32, 3, SIZE)).mean((2, 3))[:, :CLASSES]
            trunk.usual = early.mean(0)
            sure = (3 * (early - trunk.usual)).softmax(1).amax(1)
            trunk.sure = float(sure.median())
    return Around(AROUND[name], trunk).eval()


def uint8_rows(folder: Path) -> Path:
    """Bytes (N, H, W, C): cast, resized, turned, normalised and clipped in the graph."""

    class Service(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = settled(Trunk(3))

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.permute(0, 3, 1, 2).float() / 255
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear").flip(1)
            return self.trunk(x.clamp(0, 1)).softmax(1)

    example = torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    return save(Service(), folder / "uint8_rows.onnx", example=example)


def guarded_shape(folder: Path) -> Path:
    """An If on the picture's size, Where on a shape, and Scaler of ai.onnx.ml: hand-made."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    arrays = {
        "kernel": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(size=(8, 10)).astype(np.float32),
        "two": np.array([2], dtype=np.int64),
        "large": np.array([64], dtype=np.int64),
        "shape": np.array([0, -1], dtype=np.int64),
    }
    small = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["same"])],
        "small",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    pooled = helper.make_graph(
        [helper.make_node("AveragePool", ["image"], ["half"], kernel_shape=[2, 2], strides=[2, 2])],
        "large",
        [],
        [helper.make_tensor_value_info("half", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Shape", ["image"], ["size"]),
        helper.make_node("Gather", ["size", "two"], ["height"]),
        helper.make_node("Greater", ["height", "large"], ["is_large"]),
        helper.make_node("If", ["is_large"], ["x"], then_branch=pooled, else_branch=small),
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node(
            "Scaler", ["d"], ["e"], domain="ai.onnx.ml", offset=[0.1] * 8, scale=[2.0] * 8
        ),
        helper.make_node("MatMul", ["e", "matrix"], ["f"]),
        helper.make_node("Softmax", ["f"], ["output"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    path = folder / "guarded_shape.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


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
    for name in AROUND:
        for exporter in ("legacy", "dynamo"):
            made[f"{name}-{exporter}"] = lambda folder, a=(name, exporter): save(
                around(a[0]), folder / f"{a[0]}-{a[1]}.onnx", dynamo=a[1] == "dynamo"
            )
    return made | {"uint8_rows": uint8_rows, "guarded_shape": guarded_shape}
