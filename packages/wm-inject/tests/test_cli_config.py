"""--config and --print-config, on a command made for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from wm_inject.command.common import EXIT_USAGE, Parser, add_common, run_cli
from wm_inject.command.config import (
    add_config,
    layered,
    print_config,
    read_config,
    refuse_preset,
    take_over,
)


@dataclass(frozen=True)
class Recipe:
    steps: int = 10
    rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    width: int = 8
    seed: int = 0
    recipe: Recipe = Recipe()


done: list[Settings] = []


def main(*argv: object) -> int:
    def work(given: Sequence[str] | None) -> int:
        parser = Parser(prog="wm-demo")
        go = parser.add_subparsers(dest="command", required=True).add_parser("go")
        go.add_argument("images", type=Path)
        which = go.add_mutually_exclusive_group(required=True)
        which.add_argument("--near")
        which.add_argument("--far")
        go.add_argument("--out", required=True)
        go.add_argument("--preset")
        go.add_argument("--width", type=int)
        go.add_argument("--steps", type=int)
        add_common(go, version="1.2.3")
        add_config(go)
        args: argparse.Namespace = parser.parse_args(given)
        file = read_config(args)
        refuse_preset(args, "preset", "recipe", file)
        start = Settings(recipe=Recipe(steps=99)) if args.preset else Settings()
        options = {"width": args.width, "seed": args.seed, "recipe": {"steps": args.steps}}
        settings = layered(args, start, file, options)
        if args.print_config:
            return print_config(settings)
        take_over(args, settings)
        done.append(Settings(args.width, args.seed, args.recipe))
        return 0

    return run_cli(work, [str(one) for one in argv])


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
    assert done == [Settings(), Settings(3, 4, Recipe(rate=1.0)), Settings(0, 0, Recipe(5, 1.0))]


def test_printing_asks_for_nothing_and_does_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done.clear()
    assert main("go", "--print-config", "--config", file) == 0
    printed = capsys.readouterr().out
    assert printed == "width = 3\nseed = 4\n\n[recipe]\nsteps = 10\nrate = 1.0\n"
    file.write_text(printed)
    assert main("go", "images", "--config", file, "--print-config") == 0
    assert capsys.readouterr().out == printed
    assert done == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour' in settings: expected one of recipe, seed, width"),
        ("[recipe]\nstep = 1", "unknown key 'step' in settings.recipe: expected one of rate"),
        ("width = 1.5", "expected int for settings.width, got 1.5"),
        ("[recipe]\nseed = 1", "expected one seed at the top of settings"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_with_its_name(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
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
