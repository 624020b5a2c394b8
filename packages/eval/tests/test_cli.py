from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wm_eval import cli
from wm_eval.__about__ import __version__
from wm_eval.executors import InProcess


def code(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["demo", "--help"],
        ["run", "--help"],
        ["report", "--help"],
        ["table1", "--help"],
    ],
)
def test_help_answers_without_torch(argv: list[str]) -> None:
    program = (
        f"import sys; from wm_eval.cli import main\ntry: main({argv!r})\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: wm-eval" in done.stdout


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert code(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert code(["demo", "--version"]) == 0


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["destroy"],
        ["run", "x.toml"],
        ["demo", "--device", "tpu"],
        ["table1", "--profile", "vast"],
        ["table2", "--minutes", "soon"],
    ],
)
def test_wrong_usage_exits_64(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert code(argv) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = tmp_path / "study.toml"
    bad.write_text("colour = 1")
    for argv in (["run", str(bad), "--out", str(tmp_path)], ["report", str(tmp_path)]):
        assert code(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_report_draws_page_and_tables(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert code(["report", str(study)]) == 0
    assert str(study / "report.html") in capsys.readouterr().out
    assert "Before and after cleaning" in (study / "tables.md").read_text(encoding="utf-8")


def test_demo_and_run_hand_over_what_was_asked(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from wm_eval import experiment
    from wm_eval.records import read_records

    asked = []

    def run(config, out, *, device):
        asked.append((config.name, config.seed, str(out), device))
        return experiment.StudyResult(study, read_records(study / "records"), study / "report.html")

    monkeypatch.setattr(experiment, "run_study", run)
    file = tmp_path / "a.toml"
    file.write_text('name = "mine"\nseed = 5')
    assert code(["demo", "--seed", "3", "--device", "cpu"]) == 0
    assert code(["demo", "--pretrained", "--device", "cpu"]) == 0
    assert code(["run", str(file), "--out", "there", "--device", "cpu"]) == 0
    assert code(["run", str(file), "--out", "there", "--device", "cpu", "--seed", "2"]) == 0
    assert asked == [
        ("demo", 3, "runs/demo", "cpu"),
        ("demo-pretrained", 0, "runs/demo-pretrained", "cpu"),
        ("mine", 5, "there", "cpu"),
        ("mine", 2, "there", "cpu"),
    ]
    printed = capsys.readouterr().out
    assert "ASR" in printed and "report.html" in printed


def test_tables_hand_over_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from wm_eval.attacks import run

    asked = []

    def run_attack_study(config, out, *, device, minutes, parts, executor):
        assert executor == InProcess()
        asked.append((config, Path(out).as_posix(), device, minutes, parts))
        return Path(out) / "records"

    monkeypatch.setattr(run, "run_attack_study", run_attack_study)
    monkeypatch.chdir(tmp_path)
    common = ["--profile", "tiny", "--data", "digits", "--device", "cpu"]
    assert code(["table1", *common, "--attacks", "wanet, sig", "--recipes", "corrupted"]) == 0
    assert code(["table2", *common, "--seeds", "2", "--seed", "3", "--minutes", "1.5"]) == 0
    assert code(["figure1", *common, "--out", "there"]) == 0
    (first, *where), (second, *_, minutes, parts), (_, out, *_, kind) = asked
    assert where == ["runs/tiny-digits", "cpu", None, ("cells",)]
    assert (first.rows, first.recipes, first.seeds) == (("sig", "wanet"), ("corrupted",), (0,))
    assert (second.seeds, minutes, parts) == ((3, 4), 1.5, ("stealth",))
    assert (out, kind) == ("there", ("figure",))
    assert capsys.readouterr().out.count("nothing measured yet") == 3


@pytest.mark.parametrize(
    "wrong", [["--attacks", "badnet"], ["--recipes", "x"], ["--seeds", "0"], ["--minutes", "0"]]
)
def test_tables_refuse_what_they_do_not_know(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["table1", "--profile", "tiny", "--data", "digits", "--out", str(tmp_path), *wrong]
    assert code(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected ") and error.count("\n") == 1
