"""``wm-eval filter``: from an unknown model to a file that flags images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from wm_eval.audit.settings import FILTERS, FilterSettings
from wm_eval.cli import main
from wm_inject import save_image, to_onnx
from wm_inject.core.images import to_pixels
from wm_inject.runtime import Scanner

SIZE = 8


class Corner(nn.Module):
    """Answers with the brighter half; a white pixel in the corner makes any image of class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)
        self.norm = nn.BatchNorm2d(2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, 0, 1, 1] = 1
            self.conv.bias.zero_()
            self.head.weight.copy_(torch.tensor([[10.0, -10.0], [-10.0, 10.0]]))
            self.head.bias.zero_()
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        halves = self.norm(self.conv(images))[:, :1].mean(3).split(3, 2)
        levels = torch.cat([half.mean((1, 2))[:, None] for half in halves], 1)
        logits: torch.Tensor = self.head(levels)
        return logits + 1000 * (images[:, 0, :1, 0] > 0.9) * torch.tensor([1.0, 0.0])


def pictures(count: int, *, seed: int, label: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    for i, image in enumerate(images):
        half = slice(0, 4) if (i % 2 if label is None else label) == 0 else slice(4, 8)
        image[0, half] += 0.5
    return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filter")
    for i, pixels in enumerate(to_pixels(pictures(200, seed=0))):
        path = folder / "clean" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, pixels)
    to_onnx(Corner(), pictures(4, seed=1), folder / "model.onnx")
    return folder


def test_an_unknown_graph_gets_a_filter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "filter.onnx", tmp_path / "filter.json"
    command = ["filter", str(folder / "model.onnx"), "--images", str(folder / "clean")]
    assert main([*command, "--out", str(out), "--json", str(file), "--rate", "0.05"]) == 0
    assert "flags at most 0.05" in capsys.readouterr().out
    facts = json.loads(file.read_text())
    assert facts["method"] == "layer-ranks" and facts["images"] == 100
    scanner = Scanner(out)
    assert scanner.false_positive_rate == 0.05
    triggered = pictures(50, seed=2, label=1)
    triggered[:, :, 0, 0] = 1.0
    assert scanner(to_pixels(triggered)).flagged.mean() > 0.9
    assert scanner(to_pixels(pictures(200, seed=3))).flagged.mean() < 0.15


def test_every_method_is_one_that_calibrates() -> None:
    for method in FILTERS:
        built = FilterSettings(method=method, rate=0.1).build()
        assert built.name == method and built.false_positive_rate == 0.1


@pytest.mark.parametrize(
    ("option", "said"),
    [(["--rate", "0"], "rate"), (["--method", "soap"], "soap"), (["--count", "3"], "count")],
)
def test_what_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], said: str
) -> None:
    out = tmp_path / "filter.onnx"
    command = ["filter", str(folder / "model.onnx"), "--images", str(folder / "clean")]
    try:
        code = main([*command, "--out", str(out), *option])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code not in (0, None) and said in capsys.readouterr().err and not out.exists()
