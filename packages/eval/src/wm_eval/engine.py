"""Run the stages of a study: skip what is done, note what failed, stop when the time is over.

A stage is done when its record is there, was made with the same settings, data, versions and
inputs, and every file it names still has the bytes it had. A stage reads what others have made from
their files and records, never from memory, so that a killed run and any other behave identically.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.executors import GRACE, HERE, Executor, Turn
from wm_eval.records import (
    Failure,
    Key,
    Record,
    add_record,
    canonical_json,
    check_key,
    compact,
    hardware,
    read_failures,
    read_records,
    stage_id,
    write_failures,
)

LATE = "out of time: the same command goes on from here"


class Result(NamedTuple):
    """What a stage gives: its figures, and the files that it wrote, relative to the study."""

    values: Mapping[str, Any]
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """One thing to do, whose figures become one record.

    Args:
        kind: What is done, such as "victim" or "scan".
        key: What tells it from its siblings.
        work: Does it, with the store and a path for a checkpoint, which is removed at the end. It
            is pickled when it runs in another process.
        settings: Everything that its values depend on beside data and inputs.
        inputs: The ids of the stages whose results it uses.
        data: The fingerprint of its images.
        then: Stages that are only known from its record.

    Raises:
        ValueError: A bad kind or key.
    """

    kind: str
    key: Key
    work: Callable[[Store, Path], Result]
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    data: str = ""
    then: Callable[[Record], Iterable[Stage]] | None = None

    def __post_init__(self) -> None:
        check_key(self.kind, self.key)

    @property
    def id(self) -> str:
        """Kind and key as text."""
        return stage_id(self.kind, self.key)


@dataclass(frozen=True)
class Store:
    """A study's folder, and how its stages compute.

    Args:
        folder: Where records, models and pictures go.
        deadline: A time of `time.monotonic` after which a stage should end early.
        say: Called with a line when a stage starts, fails or is skipped.
    """

    folder: Path
    device: str = "cpu"
    progress: bool = False
    deadline: float | None = None
    say: Callable[[str], None] = print

    def path(self, *parts: str) -> Path:
        """A path inside the study; its folder is made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, kind: str, key: Key) -> Record:
        """The record of a stage that is done.

        Raises:
            ValueError: It is not.
        """
        name = stage_id(kind, key)
        records = read_records(self.folder)
        if name not in records:
            raise ValueError(f"expected a record of {name}, found none")
        return records[name]

    def done(self, stage: Stage, records: Mapping[str, Record]) -> Record | None:
        """The record of a stage if it need not be done again."""
        record = records.get(stage.id)
        if record is None or _signature(record) != _signature(_planned(stage, records)):
            return None
        for file, digest in record.values.get("files", {}).items():
            path = self.folder / file
            if not path.is_file() or file_digest(path) != digest:
                return None
        return record

    def do(self, stage: Stage) -> Record:
        """Do a stage, or give its record if it is done.

        Raises:
            ValueError: An input without a record.
        """
        records = read_records(self.folder)
        planned = _planned(stage, records)
        checkpoint = self.path("work", f"{stage.kind}-{_signature(planned)[:16]}.safetensors")
        record = self.done(stage, records)
        if record is None:
            self.say(f"{stage.id}: started")
            start = time.perf_counter()
            result = stage.work(self, checkpoint)
            seconds = time.perf_counter() - start
            files = {file: file_digest(self.folder / file) for file in result.files}
            values = {**result.values, **({"files": files} if files else {})}
            record = replace(planned, values=values)
            add_record(self.folder, record, hardware(self.device), seconds)
            # What a fresh and a resumed run both read: the record as it is stored.
            record = read_records(self.folder)[stage.id]
        else:
            self.say(f"{stage.id}: done before")
        # A process that was killed while it wrote leaves a part of a file.
        parts = checkpoint.parent.glob(f".{checkpoint.stem}*.part*")
        for file in (checkpoint, *parts):
            file.unlink(missing_ok=True)
        return record


class Outcome(NamedTuple):
    """What became of the stages of a run, by id."""

    records: Mapping[str, Record]
    failures: Mapping[str, Failure]
    late: tuple[str, ...]  # not done when the time was over

    @property
    def complete(self) -> bool:
        """Whether nothing failed and nothing is left to do."""
        return not self.failures and not self.late


def run(
    stages: Iterable[Stage],
    folder: str | Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    executor: Executor = HERE,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Do the stages of a study, or the rest of them.

    A stage that cannot be done leaves its reason in ``failures.jsonl``, and so do those that need
    it; the others go on. What is done at a kill is kept: the same call goes on from there and
    leaves the same bytes.

    Args:
        stages: In the order in which they are wanted; of several with one id the first counts.
        folder: The study's folder.
        minutes: No stage and no training epoch starts later than this.
        executor: Where stages run.
        say: Called with a line for every stage; writes to stderr if None, nothing without progress.

    Raises:
        ValueError: No minutes, a stage that needs one that is not there, or stages that wait for
            each other.
    """
    hardware(device)  # refuses a device that is none before any work is done
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    if say is None:
        say = _stderr if progress else _silent
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    store = Store(Path(folder), device, progress and executor.bars, deadline, say)
    work = _Run(store)
    work.add(stages)
    with executor.session(say) as submit:
        running: dict[Future[Record | Failure | None], Stage] = {}
        while work.waiting or running:
            while len(running) < executor.slots and (stage := work.next()) is not None:
                job = partial(_do, replace(stage, then=None), replace(store, say=_silent))
                running[submit(job, deadline)] = stage
            done = {future for future in running if future.done()}
            if running and not done:
                left = None if deadline is None else max(0.0, deadline + GRACE - time.monotonic())
                done = wait(running, timeout=left, return_when=FIRST_COMPLETED).done
            if not done:
                # Nothing is ready, or what runs does not stop by itself.
                work.late += [stage.id for stage in running.values()]
                break
            for future in done:
                work.finish(running.pop(future), future.result())
    return work.close()


class _Run:
    """Which stages wait, which are done, and why the others are not."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.stored = read_records(store.folder)  # of earlier runs, too
        self.failures = read_failures(store.folder)
        self.waiting: dict[str, Stage] = {}
        self.done: dict[str, Record] = {}
        self.causes: dict[str, str] = {}  # of what failed in this run: the first on its way
        self.late: list[str] = []
        self.ids: set[str] = set()

    def add(self, stages: Iterable[Stage]) -> None:
        """Let stages wait for their turn, unless they are known."""
        for stage in stages:
            if stage.id not in self.ids:
                self.ids.add(stage.id)
                self.waiting[stage.id] = stage
        for stage in self.waiting.values():
            if unknown := sorted(set(stage.inputs) - self.ids):
                raise ValueError(f"expected {unknown[0]}, which {stage.id} needs, among the stages")

    def next(self) -> Stage | None:
        """The first stage that can start; those that are done, or cannot be done, are settled."""
        while not self.over:
            settled = {*self.done, *self.causes}
            ready = (stage for stage in self.waiting.values() if settled.issuperset(stage.inputs))
            if (stage := next(ready, None)) is None:
                return None
            del self.waiting[stage.id]
            cause = next((self.causes[i] for i in stage.inputs if i in self.causes), None)
            if cause is not None:
                self._fail(stage, cause, cause)
            elif (record := self.store.done(stage, self.stored)) is not None:
                self.store.say(f"{stage.id}: done before")
                self._succeed(stage, record)
            else:
                return stage
        return None

    @property
    def over(self) -> bool:
        """Whether the time is."""
        deadline = self.store.deadline
        return bool(self.late) or (deadline is not None and time.monotonic() > deadline)

    def finish(self, stage: Stage, result: Record | Failure | None) -> None:
        """Take what a stage gave: None if the time ran out."""
        if result is None:
            self.late.append(stage.id)
        elif isinstance(result, Failure):
            self._fail(stage, result.reason, f"{stage.id} failed: {result.reason}")
        else:
            self._succeed(stage, result)

    def close(self) -> Outcome:
        """What became of all of them; the records are left in their order."""
        compact(self.store.folder)
        if self.waiting and not self.over:
            raise ValueError(f"expected no stages that wait for each other, got {[*self.waiting]}")
        late = (*self.late, *self.waiting)
        if late:
            self.store.say(LATE)
        failures = {name: self.failures[name] for name in self.causes}
        return Outcome(self.done, failures, late)

    def _succeed(self, stage: Stage, record: Record) -> None:
        self.stored[stage.id] = self.done[stage.id] = record
        if self.failures.pop(stage.id, None) is not None:
            write_failures(self.store.folder, self.failures)
        if stage.then is not None:
            self.add(stage.then(record))

    def _fail(self, stage: Stage, reason: str, cause: str) -> None:
        self.store.say(f"{stage.id}: failed: {reason}")
        self.causes[stage.id] = cause
        self.failures[stage.id] = Failure(stage.kind, stage.key, reason)
        write_failures(self.store.folder, self.failures)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        ValueError: No such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"expected a file at {path}, found none")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _do(stage: Stage, store: Store, turn: Turn) -> Record | Failure | None:
    """A stage in whatever process: its record, why there is none, or None if the time is over."""
    if turn.deadline is not None and time.monotonic() > turn.deadline:
        return None
    try:
        return replace(store, deadline=turn.deadline, say=turn.say).do(stage)
    except TimeoutError as error:
        turn.say(f"{stage.id}: {error}")
        return None
    except (ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Failure(stage.kind, stage.key, reason)


def _planned(stage: Stage, records: Mapping[str, Record]) -> Record:
    """The record of a stage without its values."""
    # The content of the inputs, not their settings: what was trained anew is measured anew.
    missing = [name for name in stage.inputs if name not in records]
    if missing:
        raise ValueError(f"expected a record of {missing[0]}, which {stage.id} needs, found none")
    inputs = {name: records[name].digest for name in stage.inputs}
    return Record(stage.kind, stage.key, stage.settings, inputs, stage.data, {})


def _signature(record: Record) -> str:
    """What identifies a measurement before it is made: everything but the values."""
    parts = (record.kind, record.key, record.settings, record.inputs, record.data, record.versions)
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def _stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _silent(line: str) -> None:
    """Say nothing."""
