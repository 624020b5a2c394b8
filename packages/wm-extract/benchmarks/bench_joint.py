"""What a training step spends its time on, each as a ratio within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from wm_extract import JointConfig, train_jointly

pytestmark = pytest.mark.bench

STEPS = 6
ROUNDS = 5
IMAGES = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def training(**changes: object) -> Callable[[], object]:
    config = JointConfig.preset("robust", iterations=STEPS, warmup=2, **changes)
    return lambda: train_jointly(IMAGES, config=config, progress=False)


def ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Median of one / other over interleaved pairs, after one warm-up of each."""
    pairs = []
    for _ in range(ROUNDS + 1):
        times = []
        for work in (one, other):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        pairs.append(times[0] / times[1])
    return statistics.median(pairs[1:])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("float32 / bfloat16", {"precision": "float32"}),
        ("24 + 8 blocks / 6 + 2", {"depth": 24, "decoder_depth": 8}),
        ("no anti-collapse / with", {"corruption_probability": 0.0}),
    ],
)
def test_training_step(benchmark: BenchmarkFixture, name: str, changes: dict[str, object]) -> None:
    plain = training()
    benchmark.extra_info[name] = ratio(training(**changes), plain)
    benchmark.pedantic(plain, rounds=ROUNDS, warmup_rounds=1)
