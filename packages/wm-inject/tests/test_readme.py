"""What the README shows, run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from wm_inject.cli import main
from wm_inject.core.images import save_image

README = Path(__file__).parents[1] / "README.md"
# Fitting SSBA takes minutes; a few steps show that the command is right.
QUICK = ["--profile", "tiny", "--set", "steps=5", "--set", "width=4"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with photos/ and, the same images in class folders, classes/."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for place, image in enumerate(pixels):
        save_image(tmp_path / "photos" / f"{place}.png", image)
        save_image(tmp_path / "classes" / ("cat", "dog")[place % 2] / f"{place}.png", image)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.integration
def test_the_examples_run(workplace, capsys):
    first, folder = blocks("python")
    exec(compile(first, README.name, "exec"), {})
    assert float(capsys.readouterr().out.replace("tensor(", "").rstrip(")\n")) > 10
    (commands,) = blocks("console")
    lines = commands.strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "wm-inject"
        quick = QUICK if arguments[0] == "fit" else []
        assert main([*arguments, *quick]) == 0, capsys.readouterr().err
    for name in ("poisoned", "poisoned-ssba", "set"):
        assert len(list((workplace / name).rglob("*.png"))) == 6
    capsys.readouterr()
    exec(compile(folder, README.name, "exec"), {})
    assert capsys.readouterr().out == "3 of 6 images poisoned\n"


def test_every_kind_is_in_the_table():
    from wm_inject.attacks import TRIGGER_KINDS

    kinds = re.findall(r"^\| `([a-z-]+)` \| `\w+Trigger`", README.read_text(), re.MULTILINE)
    assert sorted(kinds) == sorted(TRIGGER_KINDS)
