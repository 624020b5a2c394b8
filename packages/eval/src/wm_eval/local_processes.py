"""The jobs of a study in processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wm_eval.executors import Job, Submit, take_turn, to_wall
from wm_inject.core.signals import exits_on_signals

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.queues import SimpleQueue


@dataclass(frozen=True)
class LocalProcesses:
    """Processes of this machine, each with one thread, so that records depend on no count.

    They end with the session and with this process, however it ends.

    Args:
        workers: How many, at least 1.

    Raises:
        ValueError: Fewer.
    """

    workers: int = 2
    bars = False

    def __post_init__(self) -> None:
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise ValueError(f"expected workers >= 1, got {self.workers!r}")

    @property
    def slots(self) -> int:
        """One job a process."""
        return self.workers

    @contextmanager
    def session(self, say: Callable[[str], None]) -> Iterator[Submit]:
        """Start the processes as they are needed."""
        from multiprocessing import get_context

        context = get_context("spawn")  # a fork of a process with threads may hang
        alive, held = context.Pipe(duplex=False)
        lines: SimpleQueue[str] = context.SimpleQueue()
        pool = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_start, initargs=(alive, lines)
        )
        closing = threading.Event()
        speaker = threading.Thread(target=_pass_on, args=(lines, say, closing), daemon=True)
        speaker.start()

        def submit(job: Job[Any], deadline: float | None) -> Future[Any]:
            return pool.submit(_take_turn, job, to_wall(deadline))

        try:
            with exits_on_signals():  # so that the workers are ended
                yield submit
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process was ended from outside (no memory left?): the same command "
                "goes on from here"
            ) from error
        finally:
            held.close()  # every worker waits for this
            pool.shutdown(wait=True, cancel_futures=True)
            closing.set()
            speaker.join(timeout=5)
            alive.close()


_say: Callable[[str], None] = print  # of a worker; set when it starts


def _start(alive: Connection, lines: SimpleQueue[str]) -> None:
    """Make a new process a worker: it ends when the one that started it ends or lets go."""
    global _say
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _say = lines.put


def _end_with(alive: Connection) -> None:
    alive.poll(None)  # nothing is ever sent: this returns when the other end is closed
    os._exit(1)


def _take_turn(job: Job[Any], wall: float | None) -> Any:
    return take_turn(job, wall, _say)


def _pass_on(lines: SimpleQueue[str], say: Callable[[str], None], closing: threading.Event) -> None:
    """Say what the workers say, until the session has closed and all is said."""
    while True:
        last = closing.is_set()
        while not lines.empty():
            say(lines.get())
        if last:
            return
        closing.wait(0.05)
