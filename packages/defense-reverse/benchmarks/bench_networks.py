"""The reverse generator's network, as a share of the rate of matrix products in the same run."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from defense_reverse import UNetGenerator

pytestmark = pytest.mark.bench


@pytest.mark.benchmark(group="generator")
@pytest.mark.parametrize(("width", "depth", "convs"), [(8, 2, 1), (16, 2, 1), (32, 3, 2)])
def test_generator(
    benchmark: BenchmarkFixture, speed: ModuleType, width: int, depth: int, convs: int
) -> None:
    model = UNetGenerator(channels=3, width=width, depth=depth, convs=convs)
    model = model.eval().requires_grad_(False)
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    speed.measure(
        benchmark, lambda: model(images), flops=speed.count_flops(model, images), images=32
    )
