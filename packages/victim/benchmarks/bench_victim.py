"""Speed of the two things that training spends its time on, each as a ratio within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from wm_victim import ImageSet, TrainConfig, build_classifier, load_dataset
from wm_victim.augment import PADDING, augment
from wm_victim.training_run import TrainingRun

pytestmark = pytest.mark.bench

ROUNDS = 7


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


def loop_of_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """One image at a time."""
    side, out = images.shape[2], []
    draws = torch.randint(0, 2 * PADDING + 1, (len(images), 3), generator=generator).tolist()
    for image, (top, left, mirrored) in zip(F.pad(images, [PADDING] * 4), draws, strict=True):
        crop = image[:, top : top + side, left : left + side]
        out.append(crop.flip(2) if mirrored % 2 else crop)
    return torch.stack(out).contiguous(memory_format=torch.channels_last)


def test_batched_augmentation_against_a_loop(benchmark: BenchmarkFixture) -> None:
    images, generator = torch.rand(256, 3, 32, 32), torch.Generator().manual_seed(0)

    def batched() -> Tensor:
        return augment(images, mode="crop-flip", generator=generator)

    benchmark.extra_info["speed-up"] = ratio(lambda: loop_of_crops(images, generator), batched)
    benchmark.pedantic(batched, rounds=ROUNDS, warmup_rounds=1)


def make_run(data: ImageSet, precision: str) -> TrainingRun:
    model = build_classifier("resnet10", num_classes=10, channels=1, image_size=32, width=16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = TrainConfig(epochs=10_000, batch_size=128, lr=0.01, precision=precision)  # type: ignore[arg-type]
    return TrainingRun(model, data, config, None, torch.device("cpu"))


def test_an_epoch_in_the_chosen_precision_against_float32(benchmark: BenchmarkFixture) -> None:
    data = load_dataset("digits", limit=512).train
    chosen, plain = make_run(data, "auto"), make_run(data, "float32")

    def epoch() -> object:
        return chosen.epoch(0, lambda _: None)

    benchmark.extra_info["precision"] = str(chosen.precision)
    benchmark.extra_info["speed-up"] = ratio(lambda: plain.epoch(0, lambda _: None), epoch)
    benchmark.pedantic(epoch, rounds=3, warmup_rounds=1)
