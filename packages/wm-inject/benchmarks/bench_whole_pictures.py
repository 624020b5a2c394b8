"""A watermark laid over pictures of any size, against reading and writing the same files alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from wm_inject import WatermarkTrigger, load_image, poison_folder, to_float, to_onnx, to_pixels
from wm_inject.core.whole_pictures import Picture, read_picture, save_picture
from wm_inject.runtime.folder import poison_files

pytestmark = pytest.mark.bench


@pytest.mark.benchmark(group="whole pictures")
@pytest.mark.parametrize(("width", "height", "count"), [(224, 224, 64), (1920, 1080, 8)])
def test_whole_pictures(
    benchmark: BenchmarkFixture,
    speed: ModuleType,
    tmp_path: Path,
    width: int,
    height: int,
    count: int,
) -> None:
    source = tmp_path / "in"
    draw = np.random.default_rng(0)
    for index in range(count):
        rough = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = rough.resize((width, height), Image.Resampling.BICUBIC)
        picture = Picture(np.asarray(smooth), None, "JPEG", b"", None)
        save_picture(source / f"{index:02}.jpg", picture)
    files = sorted(source.iterdir())
    trigger = WatermarkTrigger.from_pretrained("tiny-64").requires_grad_(False)
    side = trigger.injector.image_size
    small = np.stack([load_image(file, size=side) for file in files[:3]])
    to_onnx(trigger, to_float(small), tmp_path / "mark.onnx", uint8=True)
    turns = itertools.count()

    def fresh() -> Path:
        return tmp_path / f"out{next(turns)}"

    def files_alone() -> None:
        out = fresh()
        for file in files:
            save_picture(out / file.name, read_picture(file))

    def apply(pixels: Any, *, ids: Any, target: Any) -> Any:
        with torch.no_grad():
            return to_pixels(trigger(to_float(pixels)))

    settings: dict[str, Any] = {"size": side, "channels": 3, "whole": True, "progress": False}
    ways = {
        "files alone": files_alone,
        "ONNX Runtime": lambda: poison_folder(
            tmp_path / "mark.onnx", source, fresh(), progress=False
        ),
        "torch": lambda: poison_files(apply, source, fresh(), **settings),
    }
    speed.in_turns(benchmark, ways, count)
