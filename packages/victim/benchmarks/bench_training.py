"""Images a second of victim training, against a plain float32 NCHW loop in the same run.

All ways start from the same weights and see the same batches: the same order, crops and flips. They
run in turns, with one thread, and their seconds are those of the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

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


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("name", ["resnet18", "preactresnet18"])
@pytest.mark.parametrize("width", [16, 64])
def test_training_against_a_plain_float32_loop(
    benchmark: BenchmarkFixture, speed: ModuleType, name: str, width: int
) -> None:
    data = random_set(IMAGES[width])
    blocked = TrainConfig.preset("paper", layout="blocked")
    ways = {
        "plain": plain_epoch(victim(name, width), data),
        "channels-last": library_epoch(victim(name, width), data, PAPER),
        "blocked": library_epoch(victim(name, width), data, blocked),
    }
    speed.in_turns(benchmark, ways, len(data))


@pytest.mark.benchmark(group="training")
def test_airbench_against_a_plain_float32_loop(
    benchmark: BenchmarkFixture, speed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.preset("airbench", batch_size=512)
    data, late = random_set(config.batch_size), 3  # the first layer's bias is frozen by then
    ways = {"plain": plain_epoch(victim("airbench"), data, config)}
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "amx", lambda: False)
        ways["eager"] = library_epoch(victim("airbench"), data, config, number=late)
    ways["library"] = library_epoch(victim("airbench"), data, config, number=late)
    speed.in_turns(benchmark, ways, len(data))


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("side", [3, 7])
def test_gradients_of_small_maps_against_onednn(
    benchmark: BenchmarkFixture, speed: ModuleType, side: int
) -> None:
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
    speed.in_turns(benchmark, ways, len(images))
