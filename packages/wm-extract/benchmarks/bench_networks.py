"""The extractor, as a share of the rate of matrix products, and images a second of corruptions."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from wm_extract import EXTRA_CORRUPTIONS, PAPER_CORRUPTIONS, UNetExtractor
from wm_extract.corruptions import Corruption

pytestmark = pytest.mark.bench
IMAGES = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CORRUPTIONS = {**PAPER_CORRUPTIONS, **EXTRA_CORRUPTIONS}


@pytest.mark.benchmark(group="extractor")
@pytest.mark.parametrize("batch", [1, 32])
def test_extractor(benchmark: BenchmarkFixture, speed: ModuleType, batch: int) -> None:
    model = UNetExtractor(channels=3).eval().requires_grad_(False)
    images = IMAGES[:batch]
    speed.measure(
        benchmark, lambda: model(images), flops=speed.count_flops(model, images), images=batch
    )


@pytest.mark.benchmark(group="corruptions")
@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corruption(benchmark: BenchmarkFixture, corruption: Corruption) -> None:
    generator = torch.Generator().manual_seed(0)
    benchmark.pedantic(
        lambda: corruption(IMAGES, generator=generator), rounds=20, iterations=5, warmup_rounds=1
    )
    benchmark.extra_info["images_per_second"] = round(32 / benchmark.stats.stats.median, 1)
