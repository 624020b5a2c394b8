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

from defense_nc import NeuralCleanse
from defense_reverse import PatchSweep, UniversalPerturbation
from wm_eval.audit.images import read_clean
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


class Quarters(nn.Module):
    """Which quarter of an image of 12 x 20 pixels is brightest, from the left; by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, (12, 5), stride=(12, 5))
        self.head = nn.Linear(4, 4)
        with torch.no_grad():
            self.conv.weight.fill_(1 / 60)
            self.conv.bias.zero_()
            self.head.weight.copy_(4 * torch.eye(4))
            self.head.bias.zero_()
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images).flatten(1))


@pytest.fixture
def quarters(tmp_path: Path) -> tuple[Path, Path]:
    """Such a network as ONNX, and a folder of its images."""
    generator = np.random.default_rng(0)
    for number in range(48):
        pixels = generator.integers(0, 60, (12, 20, 3), dtype=np.uint8)
        label = number % 4
        pixels[:, 5 * label : 5 * label + 5] += 120
        folder = tmp_path / "wide" / f"q{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    model = tmp_path / "wide.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Quarters(),
            (torch.rand(2, 3, 12, 20),),
            str(model),
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "n"}},
        )
    return model, tmp_path / "wide"


@pytest.mark.integration
def test_images_that_are_not_square_are_scanned(
    quarters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = quarters
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "sarif", "html")}
    command = ["scan", str(model), "--images", str(folder), "--image-size", "12x20"]
    command += ["--preprocessing", "unit", "--detectors", "sweep", "--device", "cpu"]
    assert main([*command, *(f"--{kind}={path}" for kind, path in outputs.items())]) in (0, 1, 2)
    said = capsys.readouterr().out
    assert "wide.onnx: onnx, onnx, 12 x 20 pixels, 3 channels, 4 classes" in said
    assert "accuracy: 100.0% of 48 images" in said
    report = json.loads(outputs["json"].read_text())
    assert report["model"]["image_size"] == [12, 20]
    assert list(report["detectors"]) == ["sweep"] and not report["failures"]
    (log,) = json.loads(outputs["sarif"].read_text())["runs"]
    assert log["invocations"][0]["executionSuccessful"]
    assert "image_size 12 x 20" in outputs["html"].read_text()


@pytest.mark.integration
def test_a_model_of_images_that_are_not_square_is_cleaned(
    quarters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = quarters
    out = tmp_path / "cleaned.onnx"
    command = ["clean", str(model), "--images", str(folder), "--out", str(out)]
    command += ["--detectors", "uap", "--label", "3", "--rounds", "1", "--device", "cpu"]
    assert main(command) in (0, 1, 2)
    assert f"wrote {out}: the original with new weights" in capsys.readouterr().out


def test_detectors_take_images_that_are_not_square(quarters: tuple[Path, Path]) -> None:
    clean = read_clean(quarters[1], size=(12, 20), channels=3)
    assert clean.images.shape == (48, 3, 12, 20)
    for scanner in (
        UniversalPerturbation(steps=5),
        PatchSweep(places=3),
        NeuralCleanse.preset("fast", steps=20),
    ):
        report = scanner.scan(Quarters(), clean.images, labels=clean.labels, progress=False)
        assert len(report.labels) == 4
        for trigger in report.triggers.values():
            assert trigger(clean.images).shape == clean.images.shape


def test_an_image_size_that_is_none_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["scan", str(tmp_path / "a.onnx"), "--images", str(tmp_path)]
    with pytest.raises(SystemExit, match="64"):
        main([*command, "--image-size", "48x"])
    said = capsys.readouterr().err
    assert "--image-size: expected a side or HEIGHTxWIDTH" in said
