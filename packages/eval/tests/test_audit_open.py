"""What `wm-eval scan` opens, from the command line, in the sandbox."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wm_eval.cli import main

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.integration
def test_torchscript_in_colour_is_opened(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, 3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net.eval(), torch.rand(2, 3, 32, 32)).save(str(tmp_path / "a.pt"))

    def stop(*_: Any) -> None:
        raise ValueError("nothing is scanned here")

    monkeypatch.setattr("wm_eval.audit.cli._audit", stop)
    report = tmp_path / "report.json"
    command = ["scan", str(tmp_path / "a.pt"), "--images", str(images), "--json", str(report)]
    assert main([*command, "--allow-torchscript", "--image-size", "32"]) == 3
    facts = json.loads(report.read_text())
    assert (facts["model"]["source"], facts["model"]["channels"]) == ("torchscript", 3)
    assert facts["model"]["image_size"] == 32
