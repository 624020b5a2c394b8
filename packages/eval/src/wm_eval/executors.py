"""Where the jobs of a study run: what every executor has to offer.

In this process: here. On several local ones: `local_processes`. As Ray tasks: `ray_tasks`.
A job, a stage of a study, is safe to kill at any moment. Jobs exchange data through the study's
folder, so that arguments and results stay small.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

GRACE = 30.0  # seconds that a job may go on after the deadline before its process is ended
_LINE = 1000  # letters of a line: a short message goes through a pipe whole or not at all
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
T = TypeVar("T")

Job = Callable[["Turn"], T]  # pickled unless it runs in this process
Submit = Callable[[Job[Any], float | None], "Future[Any]"]  # with a deadline of this process


@dataclass(frozen=True)
class Turn:
    """What a job gets when it starts.

    Args:
        deadline: A time of `time.monotonic`, of the process that works, after which it starts
            nothing; None for no end.
        say: Called with a line for every stage.
    """

    deadline: float | None
    say: Callable[[str], None]


class Executor(Protocol):
    """Where jobs run."""

    @property
    def slots(self) -> int:
        """How many are handed out at once."""

    @property
    def bars(self) -> bool:
        """Whether a job may draw on the terminal."""

    def session(self, say: Callable[[str], None]) -> AbstractContextManager[Submit]:
        """Open it; whatever still runs when the session closes is ended at once.

        Args:
            say: Gets the lines of all jobs.
        """


@dataclass(frozen=True)
class InProcess:
    """One job after the other, in this process and with its threads."""

    slots = 1
    bars = True

    @contextmanager
    def session(self, say: Callable[[str], None]) -> Iterator[Submit]:
        """A job is done when it has been submitted."""

        def submit(job: Job[Any], deadline: float | None) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(job(Turn(deadline, say)))
            return done

        yield submit


HERE = InProcess()


def to_wall(deadline: float | None) -> float | None:
    """A deadline as a time of day, which other machines know as well."""
    return None if deadline is None else time.time() + deadline - time.monotonic()


def take_turn(job: Job[T], wall: float | None, say: Callable[[str], None]) -> T:
    """Do a job in another process: one thread, and its deadline by this process's clock."""
    pin_threads()
    deadline = None if wall is None else time.monotonic() + wall - time.time()
    return job(Turn(deadline, lambda line: say(line[:_LINE])))


def pin_threads() -> None:
    """Give this process one thread, so that sums are made in one order wherever it runs."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    import torch

    torch.set_num_threads(1)
