"""Classifiers' forward passes, as a share of the rate of matrix products in the same run."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from wm_victim import build_classifier

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
