"""The units of a study, in their order, and where they run: what every executor has to offer.

In this process: here. On several local ones: `local_processes`. As Ray tasks: `ray_tasks`.

A unit is a coarse piece of a study, such as one attack of a table: its trigger, its victim, its
cells. It is safe to kill at any moment, because each of its stages is kept when it is done. What it
needs of others it finds in the study's folder, so that a unit is told little and gives back less.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import NamedTuple, Protocol

GRACE = 30.0  # seconds that a unit may go on after the deadline before its process is ended
_LINE = 1000  # letters of a line: a short message goes through a pipe whole or not at all
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How a unit ended.

    Args:
        finished: False if the time ran out before its last stage.
        failed: By stage that could not be done: why, as the units that need it are to be told.
    """

    finished: bool = True
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """What a unit is told when its turn comes.

    Args:
        failed: What failed in the units before it.
        deadline: A time of `time.monotonic`, of the process that works, after which it starts
            nothing; None for no end.
        say: Called with a line for every stage.
    """

    failed: Mapping[str, str]
    deadline: float | None
    say: Callable[[str], None]


class Unit(NamedTuple):
    """A piece of work that may run anywhere.

    ``work`` is pickled unless it runs in this process; ``after`` names the units that come first.
    """

    name: str
    work: Callable[[Turn], Outcome]
    after: tuple[str, ...] = ()


# A unit, what failed before it, and the deadline of this process.
Submit = Callable[[Unit, Mapping[str, str], float | None], "Future[Outcome]"]


class Executor(Protocol):
    """Where units run."""

    @property
    def slots(self) -> int:
        """How many are handed out at once."""

    @property
    def bars(self) -> bool:
        """Whether a unit may draw on the terminal."""

    def session(self, say: Callable[[str], None]) -> AbstractContextManager[Submit]:
        """Open it; whatever still runs when the session closes is ended at once.

        Args:
            say: Gets the lines of all units.
        """


@dataclass(frozen=True)
class InProcess:
    """One unit after the other, in this process and with its threads."""

    slots = 1
    bars = True

    @contextmanager
    def session(self, say: Callable[[str], None]) -> Iterator[Submit]:
        """A unit is done when it has been submitted."""

        def submit(
            unit: Unit, failed: Mapping[str, str], deadline: float | None
        ) -> Future[Outcome]:
            done: Future[Outcome] = Future()
            done.set_result(unit.work(Turn(failed, deadline, say)))
            return done

        yield submit


HERE = InProcess()


def run_units(
    units: Sequence[Unit],
    executor: Executor,
    *,
    deadline: float | None,
    say: Callable[[str], None],
) -> bool:
    """Run units, each after those that it names, else in their order.

    Args:
        units: Each with a name of its own.
        executor: Where.
        deadline: A time of `time.monotonic` after which none starts; those that run in other
            processes then have `GRACE` seconds left.
        say: Called with a line for every stage.

    Returns:
        False if the time ran out before the last was done.

    Raises:
        ValueError: A name that two have, or that none has; or units that wait for each other.
    """
    named = {unit.name: unit for unit in units}
    unknown = {name for unit in units for name in unit.after} - set(named)
    if len(named) < len(units) or unknown:
        raise ValueError(f"expected units of different names that know each other, got {unknown}")
    graph = TopologicalSorter({unit.name: unit.after for unit in units})
    graph.prepare()  # a CycleError is a ValueError
    order = list(named)
    ready: list[str] = []
    running: dict[Future[Outcome], str] = {}
    failed: dict[str, Mapping[str, str]] = {}  # by unit
    late = False
    with executor.session(say) as submit:
        while graph.is_active():
            ready = sorted([*ready, *graph.get_ready()], key=order.index)
            while ready and len(running) < executor.slots and not late:
                unit = named[ready.pop(0)]
                before = {k: why for name in unit.after for k, why in failed[name].items()}
                running[submit(unit, before, deadline)] = unit.name
            done = {future for future in running if future.done()}
            if running and not done:
                left = None if deadline is None else max(0.0, deadline + GRACE - time.monotonic())
                done = wait(running, timeout=left, return_when=FIRST_COMPLETED).done
            if not done:
                return False  # nothing runs any more, or what runs does not stop by itself
            for future in done:
                name, outcome = running.pop(future), future.result()
                failed[name], late = outcome.failed, late or not outcome.finished
                graph.done(name)
    return not late


def to_wall(deadline: float | None) -> float | None:
    """A deadline as a time of day, which other machines know as well."""
    return None if deadline is None else time.time() + deadline - time.monotonic()


def take_turn(
    work: Callable[[Turn], Outcome],
    failed: Mapping[str, str],
    wall: float | None,
    say: Callable[[str], None],
) -> Outcome:
    """Do a unit's work in another process: one thread, and its deadline by this one's clock."""
    pin_threads()
    deadline = None if wall is None else time.monotonic() + wall - time.time()
    if deadline is not None and time.monotonic() > deadline:
        return Outcome(finished=False)
    return work(Turn(failed, deadline, lambda line: say(line[:_LINE])))


def pin_threads() -> None:
    """Give this process one thread, so that sums are made in one order wherever it runs."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    import torch

    torch.set_num_threads(1)


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Leave on SIGTERM as on Ctrl-C, so that workers are ended; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = [
    "GRACE",
    "HERE",
    "Executor",
    "InProcess",
    "Outcome",
    "Submit",
    "Turn",
    "Unit",
    "ends_on_sigterm",
    "pin_threads",
    "run_units",
    "take_turn",
    "to_wall",
]
