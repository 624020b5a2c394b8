"""A command is killed at random moments, alone or with its children, until it ends by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tools.interrupt import _main, interrupt

# Notes that it began, works a second, and has a child that ends when it does.
WORKS = """
import subprocess, sys, time
with open(sys.argv[1], "a") as file:
    file.write("x")
watch = "import sys; sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", watch], stdin=subprocess.PIPE)
time.sleep(1)
child.communicate()
"""
ORPHANS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.integration
def test_it_is_killed_as_often_as_asked_and_then_left_alone(tmp_path: Path) -> None:
    turns = tmp_path / "turns"
    command = [sys.executable, "-c", WORKS, str(turns)]
    assert interrupt(command, kills=3, longest=0.9, seed=1) == 3
    assert 1 <= turns.stat().st_size <= 4  # a kill may come before it began


def test_a_command_that_ends_before_its_moment_was_not_killed() -> None:
    assert interrupt([sys.executable, "-c", ""], kills=2, longest=1000, seed=0) == 0


def test_its_own_failure_is_told() -> None:
    with pytest.raises(RuntimeError, match="ended with 3 after 0 kills"):
        interrupt([sys.executable, "-c", "raise SystemExit(3)"], kills=1, longest=1000)


@pytest.mark.integration
def test_children_that_outlive_it_are_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.interrupt._PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match="children outlive the command"):
        # The seed draws 1.9 s, when the child is there, and the process alone.
        interrupt([sys.executable, "-c", ORPHANS], kills=1, longest=2, seed=2)


@pytest.mark.integration
def test_the_whole_group_may_be_killed_each_time() -> None:
    short = ORPHANS.replace("60", "2.5")
    assert interrupt([sys.executable, "-c", short], kills=1, longest=2, seed=2, whole=True) == 1


@pytest.mark.parametrize(("kills", "longest"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_no_kills_and_no_time_are_refused(kills: int, longest: float) -> None:
    with pytest.raises(ValueError, match="expected kills >= 1 and longest > 0"):
        interrupt(["true"], kills=kills, longest=longest)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--kills", "1", "--longest", "1000", "--", sys.executable, "-c", ""]) == 0
    assert "killed 0 times" in capsys.readouterr().out
    assert _main(["--kills", "0", "--", "true"]) == 1
    assert "error: expected kills" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _main([])
