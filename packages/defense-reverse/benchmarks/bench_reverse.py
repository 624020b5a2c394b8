"""What the settings of the generators buy, as ratios within one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from defense_reverse import ReverseConfig, UNetGenerator, pretrain

pytestmark = pytest.mark.bench
ROUNDS = 5


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """How many times longer ``slow`` takes, the median of interleaved pairs."""
    seconds: dict[str, list[float]] = {"slow": [], "fast": []}
    for turn in range(ROUNDS + 1):
        for name, work in (("slow", slow), ("fast", fast)):
            begin = time.process_time()
            work()
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - begin)
    pairs = zip(seconds["slow"], seconds["fast"], strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def training(images: torch.Tensor, **changes: object) -> Callable[[], UNetGenerator]:
    config = replace(ReverseConfig.preset("fast", residual=False, pretrain_steps=10), **changes)
    return lambda: pretrain(images, config=config)


@pytest.mark.parametrize(
    "name, slow, fast",
    [
        ("float32 / auto", {"precision": "float32"}, {}),
        ("two convolutions per block / one", {"convs": 2}, {}),
        ("width 32, depth 3 / width 16, depth 2", {"width": 32, "depth": 3}, {}),
    ],
)
def test_training_steps(benchmark, images, name, slow, fast):
    found = ratio(training(images, **slow), training(images, **fast))
    benchmark.extra_info[name] = round(found, 2)
    benchmark.pedantic(training(images, **fast), rounds=3)
    assert found > 0
