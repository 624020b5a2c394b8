"""Images a second of victim training, against a plain float32 NCHW loop in the same run.

All ways start from the same weights and see the same batches: the same order, crops and flips. They
run in turns, with one thread, and their seconds are those of the processor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from wm_victim import ImageSet, TrainConfig, build_classifier
from wm_victim.augment import augment
from wm_victim.models import Classifier
from wm_victim.training_run import TrainingRun

pytestmark = pytest.mark.bench

ROUNDS = 7
PAPER = TrainConfig.preset("paper")
IMAGES = {16: 4 * PAPER.batch_size, 64: PAPER.batch_size}  # an epoch by width


def random_set(count: int) -> ImageSet:
    """Images of CIFAR-10's shape; their pixels do not matter to speed."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageSet(pixels.float().div(255), labels, torch.arange(count))


def victim(name: str, width: int) -> Classifier:
    return build_classifier(name, num_classes=10, channels=3, image_size=32, width=width)


def plain_epoch(model: Classifier, data: ImageSet) -> Callable[[], object]:
    """What one would write first: float32, NCHW, one optimiser step a batch."""
    optimizer = torch.optim.SGD(
        model.train().parameters(),
        lr=PAPER.lr,
        momentum=PAPER.momentum,
        weight_decay=PAPER.weight_decay,
    )

    def epoch() -> Tensor:
        generator, loss_sum = torch.Generator().manual_seed(0), torch.zeros(())
        for index in torch.randperm(len(data), generator=generator).split(PAPER.batch_size):
            images = augment(data.images[index], mode=PAPER.augment, generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.contiguous()), data.labels[index])
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(index)
        return loss_sum

    return epoch


def library_epoch(
    model: Classifier, data: ImageSet, layout: Literal["channels-last", "blocked"]
) -> Callable[[], object]:
    """The paper's recipe as `train_classifier` runs it."""
    config = TrainConfig.preset("paper", layout=layout)
    run = TrainingRun(model, data, config, None, torch.device("cpu"))
    return lambda: run.epoch(0, lambda _: None)


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("name", ["resnet18", "preactresnet18"])
@pytest.mark.parametrize("width", [16, 64])
def test_training_against_a_plain_float32_loop(
    benchmark: BenchmarkFixture, name: str, width: int
) -> None:
    if torch.get_num_threads() != 1:
        pytest.skip("seconds of several threads would add up: set OMP_NUM_THREADS=1")
    data = random_set(IMAGES[width])
    ways = {
        "plain": plain_epoch(victim(name, width), data),
        "channels-last": library_epoch(victim(name, width), data, "channels-last"),
        "blocked": library_epoch(victim(name, width), data, "blocked"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def one_round() -> None:
        for way, epoch in ways.items():
            start = time.process_time()
            epoch()
            seconds[way].append(time.process_time() - start)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    for way, spent in seconds.items():
        pairs = zip(seconds["plain"][1:], spent[1:], strict=True)
        ratios = sorted(slow / fast for slow, fast in pairs)
        benchmark.extra_info[way] = {
            "images_per_second": round(len(data) / statistics.median(spent[1:]), 1),
            "speed-up": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[ROUNDS // 4], 3), round(ratios[-1 - ROUNDS // 4], 3)],
        }
