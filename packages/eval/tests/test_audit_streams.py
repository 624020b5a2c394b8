"""A folder of 100,000 images is read as it comes: memory does not grow with what is in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from wm_inject import save_image, to_onnx
from wm_victim import build_classifier, save_classifier

MIB = 2**20
SIZE = 16
MANY, FEW = 100_000, 1_000
# What 99,000 more images may cost: their names, paths and scores. Their pixels as float32 would
# take 290 MiB alone, and twice that before they lie in one array.
MORE = 200 * MIB


# The peak of the program itself. What wait4 tells would be no less than that of its parent.
CODE = """
from wm_eval.cli import main
try:
    code = main()
finally:
    with open("/proc/self/status") as file:
        peak = next(line.split()[1] for line in file if line.startswith("VmHWM"))
    print(f"peak {peak} KiB")
raise SystemExit(code)
"""


class Ran(NamedTuple):
    code: int
    peak: int  # bytes
    seconds: float
    output: str


def wm_eval(*arguments: str) -> Ran:
    """Run the command in a process of its own, and ask the kernel for its peak of memory."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - start
    output = done.stdout + done.stderr
    peak = re.search(r"^peak (\d+) KiB$", output, re.MULTILINE)
    assert peak is not None, output
    return Ran(done.returncode, 1024 * int(peak[1]), seconds, output)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 files in ten class folders; hard links, so that they take no room."""
    folder = tmp_path_factory.mktemp("crowd")
    noise = np.random.default_rng(0)
    for label in range(10):
        place = folder / "many" / str(label)
        place.mkdir(parents=True)
        first = place / "000000.png"
        save_image(first, noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        for number in range(1, MANY // 10):
            os.link(first, place / f"{number:06}.png")
        few = folder / "few" / str(label)
        few.mkdir(parents=True)
        for number in range(FEW // 10):
            os.link(first, few / f"{number:06}.png")
    return folder


class Light(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.mark.slow
def test_inspecting_100_000_images_takes_the_memory_of_1_000(crowd, tmp_path, record_property):
    detector = tmp_path / "light.onnx"
    metadata = {"detector": {"threshold": 2.0, "false_positive_rate": 0.01}}
    example = torch.rand(3, 3, SIZE, SIZE)
    to_onnx(Light(), example, detector, uint8=True, output_names=("score",), metadata=metadata)
    ran = {}
    for name in ("few", "many"):
        given = ["inspect", str(crowd / name), "--extractor", str(detector), "--device", "cpu"]
        table = tmp_path / f"{name}.csv"
        ran[name] = wm_eval(*given, "--csv", str(table))
        assert ran[name].code == 0, ran[name].output
    assert len((tmp_path / "many.csv").read_text().splitlines()) == MANY + 1
    assert f"0 of {MANY} images are flagged" in ran["many"].output
    for name, one in ran.items():
        record_property(name, f"{one.peak // MIB} MiB, {one.seconds:.1f} s")
    assert ran["many"].peak - ran["few"].peak < MORE


@pytest.mark.slow
def test_scanning_draws_from_100_000_images_in_the_memory_of_1_000(
    crowd, tmp_path, record_property
):
    torch.manual_seed(0)
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=SIZE, width=8)
    example = torch.rand(64, 3, SIZE, SIZE)
    with torch.no_grad():  # untrained, it would answer one label for everything
        model.eval().head.bias -= model(example).mean(0)
    save_classifier(model, tmp_path / "v.safetensors")
    ran = {}
    for name in ("few", "many"):
        # The scan itself is broken off: this is about reading.
        given = ["scan", str(tmp_path / "v.safetensors"), "--images", str(crowd / name)]
        given += ["--unlabelled", "--minutes", "0.4", "--device", "cpu"]
        ran[name] = wm_eval(*given)
        assert ran[name].code in (2, 3), ran[name].output
        assert f"{MANY if name == 'many' else FEW} images of 10 classes" in ran[name].output
    for name, one in ran.items():
        record_property(name, f"{one.peak // MIB} MiB, {one.seconds:.1f} s")
    assert ran["many"].peak - ran["few"].peak < MORE
