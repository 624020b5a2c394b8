"""Which stages run, in which order, where, and what is left when one fails or time runs out."""

from __future__ import annotations

import importlib
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

from wm_eval import engine
from wm_eval.cli import executor_of
from wm_eval.engine import LATE, Outcome, Result, Stage, Store, run
from wm_eval.executors import HERE, InProcess
from wm_eval.local_processes import LocalProcesses
from wm_eval.ray_tasks import LOCAL, RayTasks
from wm_eval.records import Failure, Record, read_environments, read_study

HAS_RAY = importlib.util.find_spec("ray") is not None
# Another process imports what it does by name, and a test is no module that it could import.
WORK = """
import os, time
import torch
from wm_eval.engine import Result

def write(text, store, checkpoint):
    checkpoint.write_text("half way")
    # As a process that was killed while it wrote.
    checkpoint.with_name(f".{checkpoint.stem}.attacker.part1.safetensors").write_text("half")
    file = f"models/{text}.txt"
    store.path(file).write_text(text)
    return Result({"text": text}, (file,))

def refuse(store, checkpoint):
    raise ValueError("expected luck,\\n  got none")

def late(store, checkpoint):
    raise TimeoutError("out of time after epoch 1 of 2")

def threads(store, checkpoint):
    store.say(f"threads {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
    return Result({})

def broken(store, checkpoint):
    raise KeyError("no such thing")

def killed(store, checkpoint):
    os.kill(os.getpid(), 9)

def long(store, checkpoint):
    store.say(f"pid {os.getpid()}")
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "work_of_stages.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "work_of_stages", raising=False)
    return importlib.import_module("work_of_stages")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def stage(name: str, work: Callable[..., Result], *inputs: str, **more: Any) -> Stage:
    return Stage(name, {}, work, inputs=inputs, **more)


def go(stages: list[Stage], out: Path, **rest: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    outcome = run(stages, out, say=said.append, **rest)
    return outcome, said


def records(out: Path) -> bytes:
    return (out / "records.jsonl").read_bytes()


def chain(work: ModuleType) -> list[Stage]:
    """Three stages in another order than they can be done, and one alone."""
    return [
        stage("last", partial(work.write, "last"), "first", "second"),
        stage("first", partial(work.write, "first"), settings={"x": (1, 2)}),
        stage("second", partial(work.write, "second"), "first"),
        stage("alone", partial(work.write, "alone")),
    ]


@pytest.mark.integration
@pytest.mark.parametrize("executor", [HERE, LocalProcesses(2)])
def test_stages_come_after_those_they_need_and_are_done_once(
    executor: Any, work: ModuleType, out: Path
) -> None:
    outcome, said = go(chain(work), out, executor=executor)
    assert outcome.complete and set(outcome.records) == {"first", "second", "last", "alone"}
    order = [line for line in said if "alone" not in line]
    assert order == [f"{name}: started" for name in ("first", "second", "last")]
    before = records(out)
    outcome, said = go(chain(work), out, executor=executor)
    assert outcome.complete and all(line.endswith(": done before") for line in said)
    assert records(out) == before and not list((out / "work").iterdir())
    assert set(read_environments(out)) == set(outcome.records)
    assert outcome.records["last"].inputs.keys() == {"first", "second"}


def test_a_stage_is_done_again_if_anything_it_depends_on_has_changed(
    work: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(text: str = "a", data: str = "", **settings: Any) -> list[str]:
        a = stage("a", partial(work.write, text), settings=settings, data=data)
        said = go([a, stage("b", partial(work.write, "b"), "a")], out)[1]
        return [line.partition(":")[0] for line in said if line.endswith("started")]

    assert started(x=1) == ["a", "b"]
    assert started(x=1) == []
    assert started(x=2) == ["a", "b"]
    assert started(x=2, data="other") == ["a", "b"]
    (out / "models" / "b.txt").write_text("tampered")
    assert started(x=2, data="other") == ["b"]
    (out / "models" / "a.txt").unlink()
    assert started(x=2, data="other") == ["a"]  # with the same result: b stays
    monkeypatch.setattr("wm_eval.records.PACKAGES", ("wm-eval",))
    assert started(x=2, data="other") == ["a", "b"]


def test_the_first_of_two_stages_with_one_id_counts(work: ModuleType, out: Path) -> None:
    outcome, _ = go([stage("a", partial(work.write, t)) for t in ("one", "two")], out)
    assert outcome.records["a"].values["text"] == "one"


def test_stages_that_are_only_known_from_a_record(work: ModuleType, out: Path) -> None:
    def then(record: Record) -> Iterator[Stage]:
        if record.values["text"] == "yes":
            yield stage("more", partial(work.write, "more"), "a")

    assert set(go([stage("a", partial(work.write, "no"), then=then)], out)[0].records) == {"a"}
    yes = stage("a", partial(work.write, "yes"), settings={"x": 1}, then=then)
    for _ in range(2):
        assert set(go([yes], out)[0].records) == {"a", "more"}


@pytest.mark.integration
@pytest.mark.parametrize("executor", [HERE, LocalProcesses(2)])
def test_a_failure_takes_what_needs_it_along_and_goes_with_its_cause(
    executor: Any, work: ModuleType, out: Path
) -> None:
    def stages(first: Callable[..., Result]) -> list[Stage]:
        return [
            stage("a", first),
            stage("b", partial(work.write, "b"), "a"),
            stage("c", partial(work.write, "c"), "b"),
            stage("d", partial(work.write, "d")),
        ]

    outcome, said = go(stages(work.refuse), out, executor=executor)
    assert not outcome.complete and set(outcome.records) == {"d"} and not outcome.late
    reason = "expected luck, got none"
    assert outcome.failures["a"] == Failure("a", {}, reason)
    assert {outcome.failures[k].reason for k in "bc"} == {f"a failed: {reason}"}
    assert f"a: failed: {reason}" in said
    assert read_study(out).failures == tuple(outcome.failures[k] for k in "abc")
    outcome, _ = go(stages(partial(work.write, "a")), out, executor=executor)
    assert outcome.complete and not (out / "failures.jsonl").exists()


def test_failures_of_other_stages_stay(work: ModuleType, out: Path) -> None:
    go([stage("a", work.refuse), stage("d", partial(work.write, "d"))], out)
    assert go([stage("d", partial(work.write, "d"))], out)[0].complete
    assert [failure.id for failure in read_study(out).failures] == ["a"]


def test_a_stage_that_runs_out_of_time_is_no_failure(work: ModuleType, out: Path) -> None:
    stages = [stage("a", work.late), stage("b", partial(work.write, "b"), "a")]
    stages.append(stage("c", partial(work.write, "c")))
    outcome, said = go(stages, out, minutes=60)
    assert outcome == Outcome({}, {}, ("a", "b", "c")) and not outcome.complete
    assert said == ["a: started", "a: out of time after epoch 1 of 2", LATE]


def test_nothing_starts_after_the_deadline(
    work: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, passed = time.monotonic, 0.0

    def slow(store: Store, checkpoint: Path) -> Result:
        nonlocal passed
        passed = 3600.0
        return Result({})

    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed)
    stages = [stage("a", slow), stage("b", partial(work.write, "b"))]
    outcome, said = go(stages, out, minutes=30)
    assert set(outcome.records) == {"a"} and outcome.late == ("b",) and said[-1] == LATE
    monkeypatch.undo()
    outcome, said = go(stages, out)
    assert outcome.complete and said == ["a: done before", "b: started"]


@pytest.mark.integration
def test_what_does_not_stop_by_itself_is_ended(
    work: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GRACE", 0.1)
    for seconds in (3, 10, 30):  # until it has started by then, on a machine that is busy
        start = time.monotonic()
        settings = {"executor": LocalProcesses(1), "minutes": seconds / 60}
        outcome, said = go([stage("a", work.long)], out, **settings)
        assert outcome.late == ("a",) and time.monotonic() - start < seconds + 10
        if pids := [int(line.split()[1]) for line in said if line.startswith("pid")]:
            break
    assert gone(pids[0])


@pytest.mark.integration
def test_an_unexpected_error_is_raised_and_ends_the_workers(work: ModuleType, out: Path) -> None:
    stages = [stage("a", work.long), stage("b", work.broken)]
    with pytest.raises(KeyError, match="no such thing"):
        go(stages, out, executor=LocalProcesses(2))
    with pytest.raises(RuntimeError, match="a worker process was ended from outside"):
        go([stage("c", work.killed)], out, executor=LocalProcesses(1))


@pytest.mark.integration
def test_a_worker_has_one_thread(work: ModuleType, out: Path) -> None:
    said = go([stage("a", work.threads)], out, executor=LocalProcesses(1))[1]
    assert "threads 1 1" in said


@pytest.mark.integration
def test_sigterm_ends_the_workers(work: ModuleType, out: Path) -> None:
    pids: list[int] = []

    def say(line: str) -> None:
        if line.startswith("pid"):
            pids.append(int(line.split()[1]))
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        run([stage("a", work.long)], out, executor=LocalProcesses(1), say=say)
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


def test_stages_that_do_not_fit_together_are_refused(work: ModuleType, out: Path) -> None:
    nothing = partial(work.write, "a")
    with pytest.raises(ValueError, match="b"):
        go([stage("a", nothing, "b")], out)
    with pytest.raises(ValueError, match="wait for each other"):
        go([stage("a", nothing, "b"), stage("b", nothing, "a")], out)
    with pytest.raises(ValueError, match="minutes"):
        go([], out, minutes=0)
    with pytest.raises(ValueError, match="device"):
        go([], out, device="tpu")
    with pytest.raises(ValueError, match="key"):
        Stage("a", {"Seed": 1}, nothing)
    with pytest.raises(ValueError, match="record of a"):
        Store(out).record("a", {})


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_a_count_of_workers_that_is_none_is_refused(workers: Any) -> None:
    with pytest.raises(ValueError, match="workers >= 1"):
        LocalProcesses(workers)


@pytest.mark.parametrize("wrong", [{"gpus": -1}, {"cpus": 0}, {"address": "auto", "cpus": 2}])
def test_ray_tasks_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RayTasks(**wrong)


def test_options_choose_where_stages_run() -> None:
    from argparse import Namespace

    def chosen(device: str = "cpu", **given: Any) -> Any:
        args = {"workers": 1, "ray": None, "gpus_per_task": None, **given}
        return executor_of(Namespace(**args), device=device)

    assert chosen() == InProcess()
    assert chosen(workers=3) == LocalProcesses(3)
    assert chosen(ray=LOCAL) == RayTasks(LOCAL, 0.0)
    assert chosen("cuda", ray="ray://a:1") == RayTasks("ray://a:1", 1)
    assert chosen("cuda", ray="auto", gpus_per_task=0.25) == RayTasks("auto", 0.25)
    for device, given, match in (
        ("cpu", {"workers": 0}, "workers"),
        ("cuda", {"gpus_per_task": 1.0}, "--ray"),
        ("cuda", {"ray": LOCAL, "gpus_per_task": 0.0}, "--gpus-per-task"),
        ("cpu", {"ray": LOCAL, "gpus_per_task": -1.0}, "GPU"),
    ):
        with pytest.raises(ValueError, match=match):
            chosen(device, **given)


def test_without_ray_the_package_is_named(
    work: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match="pip install ray"):
        go([stage("a", work.threads)], out, executor=RayTasks())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray, in its own threads
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (hatch run cluster:test)")
def test_ray_tasks_leave_the_same_bytes_as_this_process(work: ModuleType, tmp_path: Path) -> None:
    for name, executor in (("here", HERE), ("there", RayTasks(cpus=2))):
        assert go(chain(work), tmp_path / name, executor=executor)[0].complete
    assert records(tmp_path / "here") == records(tmp_path / "there")
