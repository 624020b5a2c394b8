"""Speed as a ratio: two ways of doing the same work, taken in turns within one run."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from wm_inject import WaNetTrigger
from wm_inject.core.images import save_image, to_float, to_pixels
from wm_inject.export import to_onnx
from wm_inject.runtime import Poisoner, folder, poison_folder
from wm_inject.runtime.pipeline import pipeline
from wm_inject.stealth import ssim

pytestmark = pytest.mark.bench
ROUNDS = 9


def in_turns(ours: Callable[[], object], other: Callable[[], object]) -> float:
    """Median time of ``other`` over that of ``ours``: above 1, ours is faster."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for function, times in zip((ours, other), spent, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(spent[1]) / statistics.median(spent[0])


def record(benchmark, name: str, ours: Callable[[], object], other: Callable[[], object]) -> None:
    ours(), other()
    benchmark.extra_info[name] = round(in_turns(ours, other), 3)
    benchmark.pedantic(ours, rounds=3)


def test_ssim_against_scikit_image(benchmark):
    images, reference = torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32)
    settings = {"data_range": 1, "channel_axis": 0, "gaussian_weights": True, "sigma": 1.5}

    def other() -> list[float]:
        pairs = zip(images.numpy(), reference.numpy(), strict=True)
        return [
            structural_similarity(a, b, use_sample_covariance=False, **settings) for a, b in pairs
        ]

    record(benchmark, "ssim_times_scikit_image", lambda: ssim(images, reference), other)


def test_exported_warp_against_torch(benchmark, tmp_path):
    trigger = WaNetTrigger(image_size=32)
    to_onnx(trigger, torch.rand(3, 3, 32, 32), tmp_path / "m.onnx", uint8=True)
    poisoner = Poisoner(tmp_path / "m.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)

    def other() -> np.ndarray:
        with torch.no_grad():
            return to_pixels(trigger(to_float(pixels)))

    record(benchmark, "runtime_times_torch", lambda: poisoner(pixels), other)


def in_a_row(items, read, work, write=None):
    """What `pipeline` does, one step after the other."""
    for item in items:
        done = work(item, read(item))
        if write:
            write(item, done)
        yield item, done


def test_a_folder_read_worked_on_and_written_at_once(benchmark, tmp_path, monkeypatch):
    """Seconds of the clock: the gain is what a second core takes over."""
    source, model = tmp_path / "in", tmp_path / "m.onnx"
    draw = np.random.default_rng(0)
    for number in range(96):
        coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        save_image(source / f"{number}.png", coarse.repeat(14, 0).repeat(14, 1))
    to_onnx(WaNetTrigger(image_size=224), torch.rand(3, 3, 224, 224), model, uint8=True)

    def run(how) -> Callable[[], object]:
        def call() -> object:
            monkeypatch.setattr(folder, "pipeline", how)
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            return poison_folder(model, source, out, batch_size=16, progress=False)

        return call

    record(benchmark, "pipeline_times_in_a_row", run(pipeline), run(in_a_row))
