"""What the settings of the generators, and the engines of a scan, buy: ratios within one run.

What bounds the gain on a CPU: it is busy with arithmetic already when one label is trained alone,
so that many labels at once save little (kernels in the images' layout, and the overhead of small
batches). The generators gain nothing: convolutions of many of them side by side, grouped or under
vmap, are slower on a CPU than one after the other. bfloat16 halves the classifier's time at best,
and the race can drop no label that has not met the success floor.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defense_nc import Verdict
from defense_reverse import ReverseConfig, UNetGenerator, pretrain, scan
from wm_victim import build_classifier

pytestmark = pytest.mark.bench
ROUNDS = 5
VERDICT_ROUNDS = 1  # a round takes minutes


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


# All engines on one backdoored network: what precision, stacking and the race buy, and all three.
STEPS = {
    "steps": 160,
    "batch_size": 16,
    "width": 8,
    "lr": 5e-3,
    "round_steps": 8,
    "round_images": 64,
    "milestones": (0.4, 0.5, 0.6),
}
SIDES: dict[str, dict[str, Any]] = {
    "reference": {"engine": "one-by-one", "precision": "float32", "race": False},
    "precision": {"engine": "one-by-one", "precision": "auto", "race": False},
    "stacking": {"engine": "together", "precision": "float32", "race": False},
    "race": {"engine": "together", "precision": "float32", "race": True},
    "all three": {"engine": "together", "precision": "auto", "race": True},
}


class Victim(NamedTuple):
    """A PreActResNet-18 of width 16 that takes a faint chequerboard for label 3, and its images."""

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor


def tints(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey clouds with one of ten tints, which is the label: quickly learned, quickly reversed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    clouds = torch.randn(count, 1, 8, 8, generator=generator)
    clouds = F.interpolate(clouds, size=32, mode="bicubic", align_corners=False)
    angles = (labels / 10 * 2 * torch.pi)[:, None] + torch.tensor([0.0, 2.1, 4.2])
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    images = 0.5 + 0.1 * clouds + 0.1 * angles.cos()[:, :, None, None] + 0.02 * noise
    return images.clamp(0, 1), labels


def stamped(images: torch.Tensor) -> torch.Tensor:
    place = torch.arange(32)
    return (images + 0.03 * ((place[:, None] + place) % 2 * 2 - 1)).clamp(0, 1)


@pytest.fixture(scope="module")
def victim() -> Victim:
    images, labels = tints(1500, seed=0)
    poisoned = torch.arange(len(images)) // 10 % 5 == 0
    images = torch.where(poisoned[:, None, None, None], stamped(images), images)
    answers = torch.where(poisoned, 3, labels)
    model = build_classifier("preactresnet18", num_classes=10, channels=3, image_size=32, width=16)
    steps = 4 * len(images) // 32
    sgd = torch.optim.SGD(model.train().parameters(), lr=0.03, momentum=0.9)
    rate = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.03, steps, cycle_momentum=False)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=order)
        sgd.zero_grad()
        F.cross_entropy(model(images[batch]), answers[batch]).backward()
        sgd.step()
        rate.step()
    test, truth = tints(200, seed=1)
    with torch.no_grad():
        model.eval()
        assert (model(test).argmax(1) == truth).float().mean() > 0.9
        assert (model(stamped(test)).argmax(1) == 3).float().mean() > 0.9
    return Victim(model, test, truth)


def test_time_to_verdict(benchmark, victim):
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    reports = {}
    config = ReverseConfig.preset("robust", **STEPS)

    def interleaved() -> None:
        for name, changes in SIDES.items():
            begin = time.process_time()
            reports[name] = scan(
                victim.model,
                victim.images,
                labels=victim.labels,
                config=replace(config, **changes),
                progress=False,
            )
            seconds[name].append(time.process_time() - begin)

    benchmark.pedantic(interleaved, rounds=VERDICT_ROUNDS)
    spent = {name: statistics.median(values) for name, values in seconds.items()}
    told = {
        "precision": spent["reference"] / spent["precision"],
        "stacking": spent["reference"] / spent["stacking"],
        "race": spent["stacking"] / spent["race"],
        "all three": spent["reference"] / spent["all three"],
    }
    for name, factor in told.items():
        benchmark.extra_info[name] = round(factor, 2)
        sys.stdout.write(f"{name}: {factor:.2f} times faster\n")
    for name, value in spent.items():
        benchmark.extra_info[f"{name}, seconds"] = round(value, 1)
        sys.stdout.write(f"{name}: {value:.1f} s\n")
    verdicts = {(report.verdict, report.suspected) for report in reports.values()}
    assert verdicts == {(Verdict.BACKDOORED, (3,))}
