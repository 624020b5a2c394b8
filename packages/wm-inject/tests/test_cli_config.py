"""--config and --print-config, on a command made for it."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from wm_inject.command.common import EXIT_USAGE, CommandLine
from wm_inject.command.config import (
    add_config,
    add_options,
    add_preset,
    print_config,
    read_settings,
)


@dataclass(frozen=True)
class Recipe:
    steps: int = 10
    rate: float = 0.1
    kind: Literal["near", "far"] = "near"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")

    @classmethod
    def preset(cls, name: str) -> Recipe:
        return cls(steps={"large": 99}[name])


@dataclass(frozen=True)
class Settings:
    width: int | None = 8
    grey: bool = False
    seed: int = 0
    recipe: Recipe = Recipe()


done: list[Settings] = []


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args, Settings())
    if args.print_config:
        return print_config(settings)
    done.append(settings)
    return 0


def main(*argv: object) -> int:
    command = CommandLine("wm-demo", "1.2.3", description="A demo.", epilog="examples:\n")
    go = command.add("go", run, "go there")
    go.add_argument("images", type=Path)
    which = go.add_mutually_exclusive_group(required=True)
    which.add_argument("--near")
    which.add_argument("--far")
    go.add_argument("--out", required=True)
    add_options(go, Settings, {"width": "in pixels", "grey": "one channel"})
    add_preset(go, "--preset", table="recipe", choices=("large",), help="the recipe")
    add_options(go, Recipe, {"steps": "of training", "kind": "of way"}, table="recipe")
    add_config(go)
    return command.main([str(argument) for argument in argv])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text("width = 3\nseed = 4\n[recipe]\nrate = 1\n")
    return path


def test_options_win_over_the_file_and_the_file_over_the_start(file: Path) -> None:
    done.clear()
    usual = ("go", "images", "--near", "x", "--out", "y")
    assert main(*usual) == 0
    assert main(*usual, "--config", file) == 0
    assert main(*usual, "--steps", 5, "--config", file, "--width", 0, "--seed", 0) == 0
    assert main(*usual, "--config", file, "--grey", "--kind", "far") == 0
    assert done == [
        Settings(),
        Settings(3, False, 4, Recipe(rate=1.0)),
        Settings(0, False, 0, Recipe(5, 1.0)),
        Settings(3, True, 4, Recipe(rate=1.0, kind="far")),
    ]


def test_printing_asks_for_nothing_and_does_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done.clear()
    assert main("go", "--print-config", "--config", file) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed) == {
        "width": 3,
        "grey": False,
        "seed": 4,
        "recipe": {"steps": 10, "rate": 1.0, "kind": "near"},
    }
    file.write_text(printed)
    assert main("go", "images", "--config", file, "--print-config") == 0
    assert capsys.readouterr().out == printed
    assert done == []


def test_a_file_that_does_not_fit_is_one_line_with_its_name(
    file: Path, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for text, message in [
        (
            "colour = 1",
            "unknown key 'colour' in settings: expected one of grey, ",
        ),
        ("[recipe]\nstep = 1", "unknown key 'step' in settings.recipe: expected one of kind, rate"),
        ("width = 1.5", "expected int | None for settings.width, got 1.5"),
        ("[recipe]\nseed = 1", "expected one seed at the top of settings"),
    ]:
        with subtests.test(text=text, message=message):
            file.write_text(text)
            assert main("go", "--print-config", "--config", file) == 1
            told = capsys.readouterr().err
            assert told.startswith(f"error: {file}: {message}") and told.count("\n") == 1
            assert main("go", "--print-config", "--config", file.with_name("none.toml")) == 1
            assert "found none" in capsys.readouterr().err


def test_a_preset_and_its_table_are_not_both_taken(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main("go", "--print-config", "--config", file, "--preset", "large")
    assert left.value.code == EXIT_USAGE
    told = capsys.readouterr().err
    assert f"--preset and 'recipe' in {file} both say where to start" in told
    assert main("go", "--print-config", "--preset", "large") == 0
    assert "steps = 99" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["go"], ["go", "images", "--out", "y"], ["go", "--near", "x"]])
def test_without_printing_what_is_required_stays_required(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(*argv)
    assert left.value.code == EXIT_USAGE


def test_the_help_shows_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("go", "--help")
    text = capsys.readouterr().out
    assert "Go there." in text and "in pixels (default: 8)" in text and "{near,far}" in text
    assert "--no-grey" in text and "--device" in text


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["--steps", "0", "--kind", "far"], "argument --steps: expected steps >= 1"),
        (["--kind", "up"], "argument --kind"),
        (["--preset", "small"], "argument --preset"),
        (["--width", "x"], "argument --width"),
    ],
)
def test_a_value_that_does_not_fit_is_a_usage_error_that_names_the_option(
    argv: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main("go", "--print-config", *argv)
    message = capsys.readouterr().err
    assert left.value.code == EXIT_USAGE and option in message and message.count("\n") == 1
