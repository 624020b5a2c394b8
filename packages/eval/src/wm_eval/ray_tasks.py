"""The jobs of a study as Ray tasks, on this machine or on a cluster.

Every node needs the same packages, the data under the same ``WM_DATA``, and the study's folder
under the same path: stages read and write files there, and nothing large passes through Ray.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from wm_eval.executors import Job, Submit, take_turn, to_wall
from wm_inject.core.signals import exits_on_signals

LOCAL = "local"  # a cluster of this one machine, which ends with the study


@dataclass(frozen=True)
class RayTasks:
    """Ray tasks of one CPU core each.

    Args:
        address: Of a cluster, as `ray.init` takes it, or "local".
        gpus: Share of a GPU for each task, 0 for none; with 0.25, four share one.
        cpus: Cores of a local cluster; those of the machine if None.

    Raises:
        ValueError: A share below 0, fewer than 1 core, or cores for a cluster that has its own.
    """

    address: str = LOCAL
    gpus: float = 0.0
    cpus: int | None = None
    bars = False
    slots = 10_000  # Ray queues what does not fit

    def __post_init__(self) -> None:
        if not self.gpus >= 0:
            raise ValueError(f"expected a share of a GPU >= 0, got {self.gpus}")
        if self.cpus is not None and (self.cpus < 1 or self.address != LOCAL):
            raise ValueError(f"expected cores >= 1 for a local cluster alone, got {self.cpus}")

    @contextmanager
    def session(self, say: Callable[[str], None]) -> Iterator[Submit]:
        """Connect, or start a cluster of this machine.

        Raises:
            RuntimeError: Ray is not installed, or no cluster answers.
        """
        ray = _ray()
        settings: dict[str, Any] = {"address": self.address, "log_to_driver": False}
        if self.address == LOCAL:
            settings |= {"include_dashboard": False, "num_cpus": self.cpus}
        try:
            ray.init(**settings)
        except ConnectionError as error:
            raise RuntimeError(f"expected a Ray cluster at {self.address}: {error}") from error
        lines = import_module("ray.util.queue").Queue(actor_options={"num_cpus": 0})
        # A job whose node was lost is done again: it is safe to kill.
        task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=2)(_take_turn)
        closing = threading.Event()
        speaker = threading.Thread(target=_pass_on, args=(lines, say, closing), daemon=True)
        speaker.start()
        handed_out = []

        def submit(job: Job[Any], deadline: float | None) -> Future[Any]:
            handed_out.append(task.remote(job, to_wall(deadline), lines, os.getcwd()))
            future: Future[Any] = handed_out[-1].future()
            return future

        try:
            with exits_on_signals():  # so that the workers are ended
                yield submit
        finally:
            unfinished = ray.wait(handed_out, num_returns=len(handed_out), timeout=0)[1]
            for reference in unfinished if handed_out else ():
                ray.cancel(reference, force=True)
            closing.set()
            speaker.join(timeout=5)
            ray.shutdown()


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise RuntimeError("expected Ray for --ray: pip install ray") from error


def _take_turn(job: Job[Any], wall: float | None, lines: Any, folder: str) -> Any:
    os.chdir(folder)  # paths of a study may be relative to where the command was given
    return take_turn(job, wall, lines.put)


def _pass_on(lines: Any, say: Callable[[str], None], closing: threading.Event) -> None:
    """Say what the tasks say, until the session has closed and all is said."""
    while True:
        last = closing.wait(0.2)
        for line in lines.get_nowait_batch(lines.qsize()):
            say(line)
        if last:
            return
