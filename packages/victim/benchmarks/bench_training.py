"""Images a second of victim training, against a plain float32 NCHW loop in the same run.

All ways start from the same weights and see the same batches: the same order, crops and flips. They
run in turns, with one thread, and their seconds are those of the processor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from wm_victim import ImageSet, TrainConfig, build_classifier, training_run
from wm_victim.augment import augment
from wm_victim.models import Classifier
from wm_victim.training_run import TrainingRun
from wm_victim.weight_gradients import convolve

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


def victim(name: str, width: int | None = None) -> Classifier:
    return build_classifier(name, num_classes=10, channels=3, image_size=32, width=width)


def plain_epoch(
    model: Classifier, data: ImageSet, config: TrainConfig = PAPER
) -> Callable[[], object]:
    """What one would write first: float32, NCHW, one optimiser step a batch."""
    optimizer = torch.optim.SGD(
        model.train().parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )

    def epoch() -> Tensor:
        generator, loss_sum = torch.Generator().manual_seed(0), torch.zeros(())
        for index in torch.randperm(len(data), generator=generator).split(config.batch_size):
            images = augment(data.images[index], mode=config.augment, generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(
                model(images.contiguous()),
                data.labels[index],
                label_smoothing=config.label_smoothing,
            )
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(index)
        return loss_sum

    return epoch


def library_epoch(
    model: Classifier, data: ImageSet, config: TrainConfig, *, number: int = 0
) -> Callable[[], object]:
    """A recipe as `train_classifier` runs it; ``number`` is the epoch's."""
    run = TrainingRun(model, data, config, None, torch.device("cpu"))
    run.prepare()
    return lambda: run.epoch(number, lambda _: None)


def in_turns(
    benchmark: BenchmarkFixture, ways: dict[str, Callable[[], object]], images: int
) -> None:
    """Run all ways once a round; images a second, and times as fast as the first way."""
    if torch.get_num_threads() != 1:
        pytest.skip("seconds of several threads would add up: set OMP_NUM_THREADS=1")
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def one_round() -> None:
        for way, epoch in ways.items():
            start = time.process_time()
            epoch()
            seconds[way].append(time.process_time() - start)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    reference = next(iter(seconds.values()))
    for way, spent in seconds.items():
        pairs = zip(reference[1:], spent[1:], strict=True)
        ratios = sorted(slow / fast for slow, fast in pairs)
        benchmark.extra_info[way] = {
            "images_per_second": round(images / statistics.median(spent[1:]), 1),
            "speed-up": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[ROUNDS // 4], 3), round(ratios[-1 - ROUNDS // 4], 3)],
        }


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("name", ["resnet18", "preactresnet18"])
@pytest.mark.parametrize("width", [16, 64])
def test_training_against_a_plain_float32_loop(
    benchmark: BenchmarkFixture, name: str, width: int
) -> None:
    data = random_set(IMAGES[width])
    blocked = TrainConfig.preset("paper", layout="blocked")
    ways = {
        "plain": plain_epoch(victim(name, width), data),
        "channels-last": library_epoch(victim(name, width), data, PAPER),
        "blocked": library_epoch(victim(name, width), data, blocked),
    }
    in_turns(benchmark, ways, len(data))


@pytest.mark.benchmark(group="training")
def test_airbench_against_a_plain_float32_loop(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.preset("airbench", batch_size=512)
    data, late = random_set(config.batch_size), 3  # the first layer's bias is frozen by then
    ways = {"plain": plain_epoch(victim("airbench"), data, config)}
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "amx", lambda: False)
        ways["eager"] = library_epoch(victim("airbench"), data, config, number=late)
    ways["library"] = library_epoch(victim("airbench"), data, config, number=late)
    in_turns(benchmark, ways, len(data))


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("side", [3, 7])
def test_gradients_of_small_maps_against_onednn(benchmark: BenchmarkFixture, side: int) -> None:
    shape, last = (1024, 256, side, side), torch.channels_last
    images, grad = (torch.randn(shape).bfloat16().contiguous(memory_format=last) for _ in range(2))
    weight = torch.randn(256, 256, 3, 3).bfloat16().contiguous(memory_format=last)
    weight.requires_grad_()

    def gradients(maps: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(maps, weight, grad, retain_graph=True)

    ways = {
        "onednn": gradients(F.conv2d(images, weight, padding=1)),
        "side by side": gradients(convolve(images, weight)),
    }
    in_turns(benchmark, ways, len(images))
