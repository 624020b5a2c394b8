"""From requests to runs: a bounded queue, batches made of several requests, worker threads.

All state belongs to the event loop; the worker threads get arrays and give arrays.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from wm_inject.runtime.onnx_model import Array
from wm_inject.serve.models import Served

Answer = dict[str, Array]
Outcome = Answer | Exception


class Busy(Exception):
    """The queue is full, or the server stops: come back later."""


class Refused(Exception):
    """The graph itself failed on inputs that looked right; the cause is for the log only."""


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through."""

    feeds: dict[str, Array]
    count: int
    arrived: float
    deadline: float
    future: asyncio.Future[Answer]


@dataclass(eq=False, slots=True)
class Group:
    """Requests that may run as one batch, the oldest first."""

    served: Served
    jobs: deque[Job]
    images: int = 0


class Engine:
    """Run models for many clients at once; one event loop, a few worker threads.

    Requests of one model whose images have one shape are run together, as soon as a worker is free
    and at the latest when ``delay`` is over. An answer does not depend on the rest of the batch.

    Args:
        max_batch: Images in one run; a request with more is run in parts.
        delay: Seconds that a request may wait for company while a worker is free.
        queue: Images that may wait or run.
        timeout: Seconds from `submit` to the answer.
        workers: Threads, each with one run at a time.
        on_batch: Told the model's name and the number of images of every run.
    """

    def __init__(
        self,
        *,
        max_batch: int = 32,
        delay: float = 0.0,
        queue: int = 1024,
        timeout: float = 30.0,
        workers: int = 1,
        on_batch: Callable[[str, int], None] = lambda name, images: None,
    ) -> None:
        self.max_batch, self.delay, self.queue, self.timeout = max_batch, delay, queue, timeout
        self.images = 0  # that wait or run
        self.closing = False
        self._on_batch = on_batch
        self._idle = workers
        self._groups: dict[object, Group] = {}
        self._soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="wm-serve")

    async def run(self, served: Served, feeds: dict[str, Array], count: int) -> Answer:
        """Run checked inputs of ``count`` images.

        Raises:
            ValueError: More images than the queue could ever hold.
            Busy: The queue is full, or the engine was closed.
            Refused: The graph failed on these inputs.
            TimeoutError: The answer was not there in time.
        """
        if count > self.queue:
            raise ValueError(f"expected at most {self.queue} images in a request, got {count}")
        if self.closing or self.images + count > self.queue:
            raise Busy("the server stops" if self.closing else "the queue is full")
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        job = Job(feeds, count, now, now + self.timeout, loop.create_future())
        # Only what can be joined shares a key.
        key = (served.name, *(a.shape[1:] for a in feeds.values())) if served.joins else job
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(served, deque())
        group.jobs.append(job)
        group.images += count
        self.images += count
        if not self._soon:
            # Not at once: whatever else has just arrived is to come along.
            self._soon = True
            loop.call_soon(self._dispatch)
        return await job.future

    async def close(self, seconds: float) -> None:
        """Take nothing new, and give what was accepted ``seconds`` to finish."""
        self.closing = True
        end = time.monotonic() + seconds
        while self.images and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _dispatch(self) -> None:
        """Give every free worker the group that has waited longest."""
        self._soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._idle and self._groups:
            key, group = min(self._groups.items(), key=lambda item: self._due(item[1]))
            wait = self._due(group) - time.monotonic()
            if wait > 0:
                self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch)
                return
            jobs = self._take(group)
            if not group.jobs:
                del self._groups[key]
            if jobs:
                self._start(group.served, jobs)

    def _due(self, group: Group) -> float:
        """When a group is to run: at once if it is full or cannot grow."""
        alone = not group.served.joins or group.images >= self.max_batch
        return group.jobs[0].arrived + (0 if alone else self.delay)

    def _take(self, group: Group) -> list[Job]:
        """As many jobs as make one batch; those whose clients have left are dropped."""
        taken: list[Job] = []
        total = 0
        while group.jobs and (not taken or total + group.jobs[0].count <= self.max_batch):
            job = group.jobs.popleft()
            group.images -= job.count
            if job.future.done() or job.deadline <= time.monotonic():
                self._settle(job, TimeoutError())
            else:
                taken.append(job)
                total += job.count
        return taken

    def _start(self, served: Served, jobs: list[Job]) -> None:
        self._idle -= 1
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._pool, _run_jobs, served, jobs, self.max_batch)
        done.add_done_callback(partial(self._finish, served, jobs))

    def _finish(self, served: Served, jobs: list[Job], done: asyncio.Future[list[Outcome]]) -> None:
        self._idle += 1
        self._on_batch(served.name, sum(job.count for job in jobs))
        if done.cancelled():
            outcomes: Sequence[Outcome] = [Busy("the server stops")] * len(jobs)
        else:
            outcomes = done.result()
        # The worker first: it can be busy while the answers are written.
        self._dispatch()
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._settle(job, outcome)

    def _settle(self, job: Job, outcome: Outcome) -> None:
        self.images -= job.count
        if job.future.done():  # the client has gone
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)


def _run_jobs(served: Served, jobs: Sequence[Job], limit: int) -> list[Outcome]:
    """In a worker thread: one run for all, or one for each where all together fail."""
    if len(jobs) == 1:
        return [_run_one(served, jobs[0], limit)]
    feeds = {name: np.concatenate([j.feeds[name] for j in jobs]) for name in jobs[0].feeds}
    total = sum(job.count for job in jobs)
    try:
        found = served.model.run(feeds, timeout=_left(max(job.deadline for job in jobs)))
    except TimeoutError as error:
        return [error] * len(jobs)
    # ONNX Runtime raises classes of its own, all bare Exceptions: find the job that is to blame.
    except Exception:
        return [_run_one(served, job, limit) for job in jobs]
    if any(len(array) != total for array in found.values()):
        return [_run_one(served, job, limit) for job in jobs]
    answers: list[Outcome] = []
    start = 0
    for job in jobs:
        stop = start + job.count
        answers.append({name: array[start:stop] for name, array in found.items()})
        start = stop
    return answers


def _run_one(served: Served, job: Job, limit: int) -> Outcome:
    """One job alone, in parts if it is large."""
    try:
        if job.count <= limit or not served.joins:
            return served.model.run(job.feeds, timeout=_left(job.deadline))
        parts: list[Mapping[str, Array]] = []
        for start in range(0, job.count, limit):
            feeds = {name: array[start : start + limit] for name, array in job.feeds.items()}
            parts.append(served.model.run(feeds, timeout=_left(job.deadline)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except TimeoutError as error:
        return error
    except Exception as error:  # as above
        return Refused(" ".join(str(error).split())[:500])


def _left(deadline: float) -> float:
    """Seconds until then."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
