"""What the inversion costs beside the forward and backward passes that it cannot do without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from defense_nc import NCConfig, frozen, invert_trigger
from wm_victim import build_classifier

pytestmark = pytest.mark.bench

ROUNDS = 7
CONFIG = NCConfig(steps=2, batches=8, batch_size=32, early_stop=False)


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median of slow / fast over interleaved pairs, after one warm-up of each."""
    pairs = []
    for _ in range(ROUNDS + 1):
        times = []
        for work in (slow, fast):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        pairs.append(times[0] / times[1])
    return statistics.median(pairs[1:])


@pytest.mark.parametrize(("name", "width"), [("resnet10", 16), ("wanet-mnist", None)])
def test_inversion_against_bare_passes(
    benchmark: BenchmarkFixture, name: str, width: int | None
) -> None:
    size, channels = (32, 3) if name == "resnet10" else (28, 1)
    model = build_classifier(
        name, num_classes=10, channels=channels, image_size=size, width=width
    ).eval()
    images = torch.rand(64, channels, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 9 + 1

    def inversion() -> object:
        return invert_trigger(model, images, 0, config=CONFIG, labels=labels)

    def bare() -> None:
        """As many passes through the model, forward and back to the pixels, and nothing else."""
        pixels = images[:32].clone().requires_grad_()
        with frozen(model):
            for _ in range(CONFIG.steps * CONFIG.batches):
                F.cross_entropy(model(pixels), labels[:32]).backward()

    benchmark.extra_info["overhead"] = ratio(inversion, bare)
    benchmark.pedantic(inversion, rounds=ROUNDS, warmup_rounds=1)
