from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wm_eval import cli, engine
from wm_eval.__about__ import __version__
from wm_eval.engine import Outcome
from wm_eval.executors import InProcess
from wm_eval.local_processes import LocalProcesses
from wm_eval.records import Failure


def code(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_help_answers_without_torch() -> None:
    for argv in (["--help"], ["demo", "--help"], ["run", "--help"], ["tables", "--help"]):
        program = (
            f"import sys; from wm_eval.cli import main\ntry: main({argv!r})\n"
            "except SystemExit: sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0 and "usage: wm-eval" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert code(["demo", "--version"]) == 0


def test_wrong_usage_exits_64(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [],
        ["destroy"],
        ["run"],
        ["demo", "--device", "tpu"],
        ["run", "demo", "--minutes", "soon"],
        ["run", "demo", "--minutes", "0"],
        ["scan", "m.onnx", "--images", "x", "--detectors", "nothing"],
        ["scan", "m.onnx", "--images", "x", "--alpha", "2"],
        ["clean", "m.onnx", "--images", "x", "--out", "y", "--preset", "no"],
        ["run", "demo", "--workers", "2", "--ray"],
        ["run", "demo", "--workers", "0"],
        ["run", "demo", "--set", "seeds"],
        ["tables", "folder", "--formats", "md,doc"],
    ):
        assert code(argv) == 64
        assert capsys.readouterr().err.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "study.toml"
    bad.write_text("colour = 1")
    for argv in (
        ["run", str(bad)],
        ["run", "no-such-study"],
        ["tables", str(tmp_path)],
        ["tables", str(tmp_path), "--beside", str(tmp_path)],
        ["page", str(tmp_path)],
    ):
        assert code(argv) == 1, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_a_study_is_handed_over_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[tuple[Any, ...]] = []

    def run(stages: Any, out: Path, **settings: Any) -> Outcome:
        study = next(iter(stages))
        runs.append((study.settings["name"], study.settings["seeds"], out.as_posix(), settings))
        failures = {} if len(runs) < 5 else {"a": Failure("a", {}, "no luck")}
        return Outcome({}, failures, ("b",))

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.toml"
    file.write_text('name = "mine"\nseeds = [5]\n')
    assert code(["demo", "--seed", "3", "--device", "cpu"]) == 0
    assert code(["demo", "--pretrained", "--device", "cpu", "--minutes", "1.5"]) == 0
    assert code(["run", str(file), "--out", "there", "--device", "cpu", "--workers", "2"]) == 0
    sets = ["--set", "name=other", "--set", "seeds=[1, 2]"]
    assert code(["run", str(file), *sets, "--device", "cpu"]) == 0
    assert code(["run", "population-tiny", "--device", "cpu"]) == 1  # a stage failed
    here = {"device": "cpu", "minutes": None, "executor": InProcess()}
    assert runs == [
        ("demo", [3], "runs/demo", here),
        ("demo-pretrained", [0], "runs/demo-pretrained", {**here, "minutes": 1.5}),
        ("mine", [5], "there", {**here, "executor": LocalProcesses(2)}),
        ("other", [1, 2], "runs/other", here),
        ("population-tiny", [0], "runs/population-tiny", here),
    ]
    printed = capsys.readouterr().out
    assert "no tables yet" in printed and "failures.jsonl" in printed


def test_settings_are_printed_and_nothing_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["demo", "--print-config", "--seed", "4"]) == 0
    (tmp_path / "a.toml").write_text(text := capsys.readouterr().out)
    assert "seeds = [\n    4,\n]" in text
    assert code(["run", str(tmp_path / "a.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert code(["run", "--print-config"]) == 0


def test_tables_and_page_of_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(["tables", str(study), "--formats", "md,html"]) == 0
    assert code(["page", str(study), "--without-images"]) == 0
    printed = capsys.readouterr().out
    assert ".html" in printed
    assert (study / "report.html").is_file() and (study / "README.md").is_file()
