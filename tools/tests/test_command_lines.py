"""The six command lines are one: the same options, the same help, the same way to give settings."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools import release
from tools.tests.refusals.options import REFUSED

from wm_inject.command.common import EXIT_USAGE, Parser
from wm_inject.command.values import output_file, output_folder

# Why a command does not write --json, or has no --config: its product says it, or it measures none.
NO_JSON = {
    "wm-inject serve": "answers over HTTP",
    "wm-eval demo": "a folder of records",
    "wm-eval run": "a folder of records",
    "wm-eval tables": "tables from records",
    "wm-eval page": "a page from records",
}
CONFIG = {
    "wm-extract train",
    "wm-victim train",
    "defense-nc scan",
    "defense-nc clean",
    "defense-reverse scan",
    "defense-reverse clean",
    "wm-eval scan",
    "wm-eval clean",
    "wm-eval filter",
}
# These read their settings from a file that is called otherwise, or have a preset for one.
PRINT_ONLY = {"wm-eval run", "wm-eval demo"}


class Stop(Exception):
    """Thrown where a command would begin to parse: its parser is all that is wanted."""


def parser(module: str) -> argparse.ArgumentParser:
    """The outermost parser of a package's command, as its ``main`` builds it."""
    found: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: Any) -> None:
        found.append(self)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(Parser, "parse_args", parse)
        importlib.import_module(f"{module}.cli").main([])
    return found[0]


PARSERS = {package.name: parser(package.module) for package in release.packages()}


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every sub-command once, by its first name."""
    for name, outer in PARSERS.items():
        seen: list[argparse.ArgumentParser] = []
        for verb, one in inner(outer).choices.items():
            if one not in seen:
                seen.append(one)
                yield f"{name} {verb}", one


def inner(outer: argparse.ArgumentParser) -> Any:
    (found,) = (a for a in outer._actions if isinstance(a, argparse._SubParsersAction))
    return found


COMMANDS = dict(commands())


def options(one: argparse.ArgumentParser) -> set[str]:
    return set(one._option_string_actions)


def test_every_command_line_opens_alike(subtests: pytest.Subtests) -> None:
    for name in PARSERS:
        with subtests.test(name=name):
            outer = PARSERS[name]
            assert (
                outer.prog == name and inner(outer).metavar == "COMMAND" and inner(outer).required
            )
            assert {"--version", "--completion", "--help"} <= options(outer)
            assert str(outer.epilog).startswith("examples:\n") and outer.description
            assert f"  {name} " in str(outer.epilog)


def test_every_command_takes_the_common_options(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            assert {"--version", "--help", "--device", "--seed"} <= options(COMMANDS[name])


def test_every_command_shows_examples_of_itself(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            epilog = str(COMMANDS[name].epilog)
            assert epilog.startswith("examples:\n") and f"  {name} " in epilog


def test_every_command_says_what_it_does(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            assert str(COMMANDS[name].description).endswith((".", "?"))


def test_every_option_says_what_it_is(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            silent = [a.dest for a in COMMANDS[name]._actions if not a.help]
            assert silent == []


def test_what_prints_figures_writes_json(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            assert ("--json" in options(COMMANDS[name])) != (name in NO_JSON)


def test_settings_come_from_a_file_and_print_themselves(subtests: pytest.Subtests) -> None:
    for name in COMMANDS:
        with subtests.test(name=name):
            taken = options(COMMANDS[name])
            assert ("--config" in taken) == (name in CONFIG)
            assert ("--print-config" in taken) == (name in CONFIG | PRINT_ONLY)


@pytest.mark.parametrize("name", PARSERS)
def test_help_imports_no_torch(name: str) -> None:
    module = next(package.module for package in release.packages() if package.name == name)
    verbs = list(inner(PARSERS[name]).choices)
    code = f"""
import sys
from {module}.cli import main
for verb in {verbs}:
    try:
        main([verb, "--help"])
    except SystemExit as left:
        assert left.code == 0
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_lists_above_name_commands_that_exist() -> None:
    assert set(NO_JSON) | CONFIG | PRINT_ONLY <= set(COMMANDS)


def test_all_that_gives_a_verdict_says_so() -> None:
    scans = [n for n in COMMANDS if n.endswith(" scan") and not n.startswith("wm-inject")]
    assert len(scans) == 3
    for name in scans:
        epilog = str(COMMANDS[name].epilog)
        assert "0 clean, 1 backdoored, 2 inconclusive, 3 not scanned" in epilog


def test_the_page_on_commands_names_them_all() -> None:
    page = (release.ROOT / "docs" / "commands.md").read_text()
    rows = page[page.index("| command | what its file holds |") :].splitlines()
    for name in CONFIG:
        package, verb = name.split()
        cells = [row.split("|")[1] for row in rows if row.startswith(f"| `{package} ")]
        assert any(f"`{name}`" in cell or f"`{verb}`" in cell for cell in cells), name
    assert all(f"{name} " in page for name in PRINT_ONLY)
    reason = page[page.index("## Figures as JSON") : page.index("## Settings as a file")]
    for name in NO_JSON:
        assert f"`{name}`" in reason or f"`{name.split()[1]}`" in reason, name


MODULES = {package.name: package.module for package in release.packages()}
# What a command needs besides names of files, to be right but for one option.
NEEDED = {"wm-inject serve": {"--model": "a=b"}, "wm-inject fit": {"--trigger": "ssba"}}


SIGNED = {"--label-offset"}  # any whole number


def given(name: str, wrong: argparse.Action | None = None, value: str = "") -> list[str]:
    """The command with everything that it requires, of which no file is there, and a wrong value.

    Args:
        wrong: The option or positional that gets the value.
    """
    one, argv = COMMANDS[name], name.split()
    for action in one._actions:
        if action.required or action is wrong:
            right = next(iter(action.choices), "x") if action.choices else "x"
            right = NEEDED.get(name, {}).get((action.option_strings or [""])[0], right)
            argv += [*action.option_strings[:1], value if action is wrong else str(right)]
        elif not action.option_strings and wrong is not None and not wrong.option_strings:
            argv.append("x")  # a path before OUT that may be left out
    for group in one._mutually_exclusive_groups:
        if group.required:
            argv += [group._group_actions[0].option_strings[0], "x"]
    return argv


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that refuses its options; another end is none."""
    command, *rest = argv
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"{MODULES[command]}.cli").main(rest)
    output = capsys.readouterr().err
    assert left.value.code == EXIT_USAGE and output.count("\n") == 1, output
    return output


def is_number(action: argparse.Action, text: str = "3") -> bool:
    try:
        return callable(action.type) and type(action.type(text)) in (int, float)
    except (ValueError, argparse.ArgumentTypeError):
        return False


@pytest.mark.integration
def test_every_number_has_a_range_without_nan(
    capsys: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, one in COMMANDS.items():
        for action in filter(is_number, one._actions):
            option = action.option_strings[0]
            if option in SIGNED:
                continue
            for value in ("nan", "-1") if is_number(action, "0.5") else ("-1",):
                with subtests.test(name=name, option=option, value=value):
                    assert option in refusal(given(name, action, value), capsys)
    assert not list(tmp_path.iterdir())


def test_every_output_is_checked_before_the_work(
    capsys: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    outputs = "json sarif html csv out filter reversed triggers save_trigger calibrate triton state"
    for name, one in COMMANDS.items():
        for action in one._actions:
            if action.dest in outputs.split():
                assert action.type in (output_file, output_folder), (name, action.dest)
            if action.type not in (output_file, output_folder):
                continue
            wrong = ["folder", "file/out"] if action.type is output_file else ["file", "file/out"]
            label = (action.option_strings or [str(action.metavar)])[0]
            for value in wrong:
                with subtests.test(name=name, output=label, value=value):
                    assert label in refusal(given(name, action, value), capsys)
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "folder").iterdir())


def test_bad_values_are_refused_before_any_work(subtests: pytest.Subtests) -> None:
    """All of them in one process, which has not imported torch at the end."""
    argvs = [[*argv, option, value] for argv, option, value in REFUSED]
    code = f"""
import contextlib, importlib, io, json, sys
rows = []
for argv in {argvs!r}:
    module, err = {MODULES!r}[argv[0]], io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(module + ".cli").main(argv[1:])
        except SystemExit as left:
            code = left.code
    rows.append((code, err.getvalue()))
print(json.dumps([rows, "torch" in sys.modules]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    rows, torch = json.loads(process.stdout)
    for (_, option, value), (code, output) in zip(REFUSED, rows, strict=True):
        with subtests.test(option=option, value=value):
            assert code == EXIT_USAGE and option in output and output.count("\n") == 1, output
    assert not torch
