from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wm_eval import cli
from wm_eval.__about__ import __version__


def code(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize(
    "argv", [["--help"], ["demo", "--help"], ["run", "--help"], ["report", "--help"]]
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


@pytest.mark.parametrize("argv", [[], ["destroy"], ["run", "x.toml"], ["demo", "--device", "tpu"]])
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
    assert code(["run", str(file), "--out", "there", "--device", "cpu"]) == 0
    assert code(["run", str(file), "--out", "there", "--device", "cpu", "--seed", "2"]) == 0
    assert asked == [
        ("demo", 3, "runs/demo", "cpu"),
        ("mine", 5, "there", "cpu"),
        ("mine", 2, "there", "cpu"),
    ]
    printed = capsys.readouterr().out
    assert "ASR" in printed and "report.html" in printed
