"""Classifiers' forward passes, as a share of the rate of matrix products in the same run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from wm_inject import to_onnx
from wm_victim import build_classifier
from wm_victim.loading import open_model

pytestmark = pytest.mark.bench


@pytest.mark.benchmark(group="classifier")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("name", "width"), [("resnet10", 16), ("preactresnet18", 16)])
def test_classifier(
    benchmark: BenchmarkFixture, speed: ModuleType, name: str, width: int, layout: str
) -> None:
    model = build_classifier(name, num_classes=10, channels=3, image_size=32, width=width)
    model.eval().requires_grad_(False)
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if layout == "NHWC":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    speed.measure(
        benchmark, lambda: model(images), flops=speed.count_flops(model, images), images=32
    )


@pytest.mark.benchmark(group="classifier")
def test_an_onnx_file_against_its_network(
    benchmark: BenchmarkFixture, speed: ModuleType, tmp_path: Path
) -> None:
    """Forward and back to the pixels, as every search does, from the file and as it was."""
    name = "timm:tf_efficientnet_lite0"
    model = build_classifier(name, num_classes=10, channels=3, image_size=224)
    model.eval().requires_grad_(False)
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_onnx(model, images, tmp_path / "model.onnx")
    imported = open_model(tmp_path / "model.onnx").module

    def passes(network: nn.Module) -> object:
        pixels = images.clone().requires_grad_()
        return torch.autograd.grad(network(pixels).logsumexp(1).sum(), pixels)

    ways = {"network": lambda: passes(model), "ONNX file": lambda: passes(imported)}
    speed.in_turns(benchmark, ways, len(images))
