"""The settings of the commands that measure, as files."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_eval import cli
from wm_eval.cli_settings import asked_seeds, listed, named_in, numbers


def printed(*argv: object) -> str:
    """What --print-config prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert cli.main([*map(str, argv), "--print-config"]) == 0
    return out.getvalue()


DATA = st.sampled_from(["mnist", "cifar10", "gtsrb", "digits", "some/folder"])
PROFILES = st.sampled_from(["tiny", "small", "paper"])
COUNT = st.integers(1, 5)
SEED = st.integers(0, 2**31)
DETECTORS = st.sampled_from(["nc", "reverse", "nc,reverse", "reverse,bti-dbf"])
SCANS = {
    "--detectors": DETECTORS,
    "--preset": st.sampled_from(["fast", "robust"]),
    "--alpha": st.floats(1e-6, 0.9),
    "--count": st.integers(1, 999),
    "--seed": SEED,
}
TABLE = {
    "--profile": PROFILES,
    "--data": DATA,
    "--attacks": st.sampled_from(["wanet", "badnets, sig", "watermark"]),
    "--seeds": COUNT,
    "--recipes": st.sampled_from(["plain", "plain,corrupted"]),
    "--seed": SEED,
}
COMMANDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "table1": TABLE,
    "table2": TABLE,
    "figure1": TABLE,
    "detect": {
        "--data": DATA,
        "--arch": st.sampled_from(["vgg16", "resnet10"]),
        "--width": st.integers(1, 64),
        "--attack": st.sampled_from(["wanet", "badnets"]),
        "--limit": st.integers(1, 9999),
        "--epochs": st.integers(1, 99),
        "--seeds": COUNT,
        "--detectors": DETECTORS,
        "--images": st.integers(1, 999),
        "--shares": st.sampled_from(["0.01", "0.01,0.5"]),
        "--seed": SEED,
    },
    "mitigate": {
        "--profile": PROFILES,
        "--data": DATA,
        "--attacks": st.sampled_from(["clean,wanet", "badnets"]),
        "--methods": st.sampled_from(["fine-tuning", "nad,ft-sam"]),
        "--shares": st.sampled_from(["0.01", "0.01,0.5"]),
        "--steps": st.integers(1, 999),
        "--seeds": COUNT,
        "--seed": SEED,
    },
    "population": {
        "--profile": st.sampled_from(["tiny", "small"]),
        "--detectors": DETECTORS,
        "--preset": st.sampled_from(["fast", "robust"]),
    },
    "figure3": {
        "--detector": st.sampled_from(["nc", "reverse"]),
        "--preset": st.sampled_from(["fast", "robust"]),
        "--images": st.integers(1, 999),
    },
    "scan": SCANS,
    "clean": SCANS | {"--rounds": st.integers(1, 9)},
}


@pytest.mark.parametrize("command", COMMANDS)
@settings(derandomize=True, max_examples=10, deadline=None)
@given(data=st.data())
def test_what_is_printed_gives_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, command: str, data: st.DataObject
) -> None:
    options = data.draw(st.fixed_dictionaries({}, optional=COMMANDS[command]))
    if options.get("--detectors", "").endswith("dbf"):
        options.pop("--preset", None)
    text = printed(command, *(part for pair in options.items() for part in pair))
    file = tmp_path_factory.mktemp("settings") / "mine.toml"
    file.write_text(text)
    assert printed(command, "--config", file) == text


@pytest.mark.parametrize("options", [[], ["--pretrained"], ["--seed", "3"]])
def test_the_demo_prints_a_study_that_run_takes(tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "study.toml"
    file.write_text(printed("demo", *options))
    assert printed("run", file) == file.read_text()
    assert printed("run", file, "--seed", 8) == file.read_text().replace(
        "seed = 3" if options[-1:] == ["3"] else "seed = 0", "seed = 8", 1
    )


def test_run_without_a_file_prints_the_study_that_nothing_changes(tmp_path: Path) -> None:
    empty = tmp_path / "study.toml"
    empty.write_text("")
    assert printed("run") == printed("run", empty)


def test_a_file_names_its_own_start_and_options_win(tmp_path: Path) -> None:
    from wm_eval.attacks.profiles import attack_profile

    file = tmp_path / "mine.toml"
    file.write_text('profile = "tiny"\nattacks = ["sig"]\n[data]\nname = "digits"\n')
    start = attack_profile("tiny", "digits")
    text = printed("table1", "--config", file, "--seeds", 2)
    assert f"epochs = {start.train.epochs}" in text and f"width = {start.victim.width}" in text
    assert text.startswith('name = "tiny-digits"') and '"sig"' in text and '"wanet"' not in text
    other = printed("table1", "--config", file, "--attacks", "wanet", "--data", "mnist")
    assert '"wanet"' in other and '"sig"' not in other and 'name = "mnist"' in other


@pytest.mark.parametrize(
    ("command", "text", "code", "message"),
    [
        ("table1", "colour = 1", 1, "unknown key 'colour' in settings: expected one of attacks, "),
        ("table1", "data = 3", 1, "expected a table for settings.data, got 3"),
        ("table1", 'profile = "vast"', 1, None),
        ("detect", "images = 1.5", 1, "for settings.images, got 1.5"),
        ("detect", "victim = 1", 1, "expected a table for settings.victim, got 1"),
        ("mitigate", "study = 1", 1, "expected a table for settings.study, got 1"),
        ("mitigate", "[study]\ncolour = 1", 1, "unknown key 'colour' in settings.study: "),
        ("population", "[worlds.a.study]\nx = 1", 1, "unknown key 'x' in settings.worlds.a.study"),
        ("figure3", 'images = "many"', 1, "expected int for settings.images, got 'many'"),
        ("scan", "seed = 1.5", 3, "expected int for settings.seed, got 1.5"),
        ("clean", "round = 1", 3, "unknown key 'round' in settings: expected one of alpha, "),
        ("run", "colour = 1", 1, "unknown key 'colour' in study: expected one of data, "),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    text: str,
    code: int,
    message: str | None,
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    given_file = [str(file)] if command == "run" else ["--config", str(file)]
    assert cli.main([command, *given_file, "--print-config"]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    wanted = "error: expected a profile in tiny" if message is None else f"error: {file}: "
    assert said.startswith(wanted) and (message or "") in said


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("table1", 'profile = "tiny"'),
        ("mitigate", '[study]\nprofile = "tiny"'),
        ("population", "[worlds.a]"),
    ],
)
def test_a_profile_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--config", str(file), "--profile", "small", "--print-config"])
    assert left.value.code == 64
    assert "both say where to start" in capsys.readouterr().err


def test_lists_seeds_and_names() -> None:
    class Given:
        seeds: int | None = None
        seed: int | None = None

    args: Any = Given()
    assert asked_seeds(args, (4, 9)) == (4, 9)
    args.seeds = 3
    assert asked_seeds(args, (4, 9)) == (4, 5, 6)
    args.seed, args.seeds = 0, None
    assert asked_seeds(args, (4, 9)) == (0, 1)
    assert listed("a, b,") == ("a", "b") and numbers("1,0.5") == (1.0, 0.5)
    assert named_in({"a": {"b": 3}}, "a", "b") is None and named_in({"a": 1}, "a", "b") is None


def test_numbers_that_are_none_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["mitigate", "--shares", "much"])
    assert left.value.code == 64
    assert "expected numbers as 0.5,0.5, got 'much'" in capsys.readouterr().err
