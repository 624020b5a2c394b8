"""Where units run: their order, what they are told, how they end, and the same bytes everywhere."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from wm_eval import executors
from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.attacks.run import run_attack_study
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.executor_options import add_executor, chosen_executor
from wm_eval.executors import HERE, InProcess, Outcome, Turn, Unit, run_units
from wm_eval.local_processes import LocalProcesses
from wm_eval.paper2.config import detect_preset
from wm_eval.paper2.run import run_detect
from wm_eval.population.config import PopulationConfig, World
from wm_eval.population.run import run_population
from wm_eval.ray_tasks import LOCAL, RayTasks
from wm_victim import TrainConfig

HAS_RAY = importlib.util.find_spec("ray") is not None
TRAIN = TrainConfig.preset("fast", epochs=1, precision="float32")
STUDY = AttackStudyConfig(
    profile="tiny",
    data=DataConfig("digits", image_size=16, limit=200),
    victim=VictimConfig("resnet10", 8),
    train=TRAIN,
    attacks=("badnets", "lf", "equation2"),
    measure=MeasureConfig(corruptions=("mask",), limit=100, pictures=1),
    stealth_images=20,
    watched_images=20,
)
# Another process imports what it does by name, and a test is no module that it could import.
WORK = """
import os, time
import torch
from wm_eval.executors import Outcome

def note(name, turn):
    turn.say(f"{name} told {sorted(turn.failed)}")
    return Outcome(True, {f"stage-{name}": "no luck"})

def late(turn):
    return Outcome(finished=False)

def threads(turn):
    turn.say(f"threads {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
    return Outcome()

def broken(turn):
    raise ValueError("no such thing")

def killed(turn):
    os.kill(os.getpid(), 9)

def long(turn):
    turn.say(f"pid {os.getpid()}")
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "units_of_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "units_of_work", raising=False)
    return importlib.import_module("units_of_work")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def go(units: list[Unit], executor: Any = HERE, **settings: Any) -> tuple[bool, list[str]]:
    said: list[str] = []
    done = run_units(units, executor, **{"deadline": None, "say": said.append, **settings})
    return done, said


def test_units_come_in_their_order_and_after_those_they_name(work: ModuleType) -> None:
    units = [
        Unit("late", partial(work.note, "late"), ("first", "other")),
        Unit("first", partial(work.note, "first")),
        Unit("other", partial(work.note, "other"), ("first",)),
        Unit("alone", partial(work.note, "alone")),
    ]
    wanted = ["first told []", "other told ['stage-first']"]
    wanted.append("late told ['stage-first', 'stage-other']")
    done, said = go(units)
    assert done and [line for line in said if "alone" not in line] == wanted
    done, said = go(units, LocalProcesses(2))
    assert done and [line for line in said if "alone" not in line] == wanted
    assert "alone told []" in said


def test_a_worker_has_one_thread(work: ModuleType) -> None:
    assert go([Unit("a", work.threads)], LocalProcesses(1)) == (True, ["threads 1 1"])


def test_nothing_starts_after_a_unit_that_was_out_of_time(work: ModuleType) -> None:
    assert go([Unit("a", work.late), Unit("b", partial(work.note, "b"))]) == (False, [])


def test_nothing_starts_after_the_deadline(work: ModuleType) -> None:
    units = [Unit("a", partial(work.note, "a"))]
    past = time.monotonic() - 1
    assert go(units, LocalProcesses(1), deadline=past) == (False, [])


def test_what_does_not_stop_by_itself_is_ended(
    work: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "GRACE", 0.1)
    said: list[str] = []
    for seconds in (3, 10, 30):  # until it has started by then, on a machine that is busy
        start = time.monotonic()
        done, said = go([Unit("a", work.long)], LocalProcesses(1), deadline=start + seconds)
        assert not done and time.monotonic() - start < seconds + 10
        if said:
            break
    assert gone(int(said[0].split()[1]))


def test_an_unexpected_error_is_told_and_ends_the_workers(work: ModuleType) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        go([Unit("a", work.long), Unit("b", work.broken)], LocalProcesses(2))


def test_a_worker_that_was_killed_is_told(work: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="a worker process was ended from outside"):
        go([Unit("a", work.killed)], LocalProcesses(1))


def test_sigterm_ends_the_workers(work: ModuleType) -> None:
    pids: list[int] = []

    def say(line: str) -> None:
        pids.append(int(line.split()[1]))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        run_units([Unit("a", work.long)], LocalProcesses(1), deadline=None, say=say)
    assert leaving.value.code == 143 and gone(pids[0])
    assert signal.getsignal(signal.SIGTERM) is before


def gone(pid: int) -> bool:
    """Whether a process ends within five seconds; one that nobody has waited for counts."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "units",
    [
        [Unit("a", print), Unit("a", print)],
        [Unit("a", print, ("b",))],
        [Unit("a", print, ("b",)), Unit("b", print, ("a",))],
    ],
)
def test_units_that_do_not_fit_together_are_refused(units: list[Any]) -> None:
    with pytest.raises(ValueError):
        go(units)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_a_count_of_workers_that_is_none_is_refused(workers: Any) -> None:
    with pytest.raises(ValueError, match="expected workers >= 1, got"):
        LocalProcesses(workers)


@pytest.mark.parametrize("wrong", [{"gpus": -1}, {"cpus": 0}, {"address": "auto", "cpus": 2}])
def test_ray_tasks_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RayTasks(**wrong)


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_executor(parser)
    return parser.parse_args(argv)


def test_options_choose_where_stages_run() -> None:
    assert chosen_executor(options(), device="cpu") == InProcess()
    assert chosen_executor(options("--workers", "3"), device="cpu") == LocalProcesses(3)
    assert chosen_executor(options("--ray"), device="cpu") == RayTasks(LOCAL, 0.0)
    assert chosen_executor(options("--ray", "ray://a:1"), device="cuda") == RayTasks("ray://a:1", 1)
    given = options("--ray", "auto", "--gpus-per-task", "0.25")
    assert chosen_executor(given, device="cuda") == RayTasks("auto", 0.25)


@pytest.mark.parametrize(
    ("argv", "device", "told"),
    [
        (["--workers", "0"], "cpu", "expected workers >= 1, got 0"),
        (["--gpus-per-task", "1"], "cuda", "together with --ray"),
        (["--ray", "--gpus-per-task", "0"], "cuda", "above 0 with --device cuda"),
        (["--ray", "--gpus-per-task", "-1"], "cpu", "expected a share of a GPU >= 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(argv: list[str], device: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        chosen_executor(options(*argv), device=device)


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match="expected Ray for --ray: pip install ray"):
        go([Unit("a", print)], RayTasks())


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".env.json")
    }


def table(out: Path, executor: Any) -> None:
    run_attack_study(STUDY, out, say=lambda _: None, executor=executor)


def population(out: Path, executor: Any) -> None:
    world = World(STUDY, {"clean": 1}, {"clean": 1, "badnets": 1, "lf": 1})
    config = PopulationConfig({"digits": world}, images=20)
    run_population(config, out, scans=False, say=lambda _: None, executor=executor)


def detect(out: Path, executor: Any) -> None:
    config = detect_preset(
        "digits",
        limit=200,
        train=TRAIN,
        attack="badnets",
        seeds=(0,),
        detectors=("nc",),
        methods=("fine-tuning",),
        images=20,
        tested=50,
        cleaning_shares=(0.1, 0.2),
    )
    parts = ("cleaning",)
    run_detect(config, out, parts=parts, progress=False, say=lambda _: None, executor=executor)


@pytest.mark.slow
@pytest.mark.parametrize("study", [table, population, detect])
def test_two_processes_leave_the_same_bytes_as_this_one(
    study: Callable[[Path, Any], None], tmp_path: Path, one_thread: None
) -> None:
    study(tmp_path / "here", HERE)
    study(tmp_path / "there", LocalProcesses(2))
    assert all_bytes(tmp_path / "here") == all_bytes(tmp_path / "there")
    assert list(tmp_path.rglob("here/**/victim-plain-badnets-*.json"))


def test_a_stage_that_failed_is_told_to_the_units_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wm_eval.attacks import run

    def refuse(*_: Any) -> Any:
        raise RuntimeError("the loss is NaN")

    monkeypatch.setattr(run, "train_victim", refuse)
    table(tmp_path, HERE)
    failed = {path.stem: path.read_text() for path in tmp_path.glob("failures/*.json")}
    assert "victim-plain-clean-0 failed: the loss is NaN" in failed["trigger-lf-0"]
    assert {"cell-plain-badnets-0", "victim-plain-clean-0"} <= set(failed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray, in its own threads
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (hatch run cluster:test)")
def test_ray_tasks_leave_the_same_bytes_as_this_process(tmp_path: Path, one_thread: None) -> None:
    table(tmp_path / "here", HERE)
    table(tmp_path / "there", RayTasks(cpus=2))
    assert all_bytes(tmp_path / "here") == all_bytes(tmp_path / "there")


def test_the_turn_of_this_process_is_handed_on_as_it_is() -> None:
    seen: list[Turn] = []

    def look(turn: Turn) -> Outcome:
        seen.append(turn)
        return Outcome()

    assert run_units([Unit("a", look)], HERE, deadline=5.0, say=print)
    assert seen == [Turn({}, 5.0, print)]
