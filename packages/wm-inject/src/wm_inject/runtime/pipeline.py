"""Read, process and write batches concurrently, in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Done = TypeVar("Done")

WORKERS = 2  # decoders and encoders of images leave Python's lock, so threads are enough
AHEAD = 2  # batches that may lie ready before the work, and after it


def pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Done],
    write: Callable[[Item, Done], None] | None = None,
) -> Iterator[tuple[Item, Done]]:
    """Read the next items and write the last ones in threads while one is processed in this thread.

    Yields:
        Every item with the result of ``work``, in order, after it has been written.

    Raises:
        Exception: The first error of the three. Nothing more is read then, and finished items are
            still written.
    """
    reading: deque[tuple[Item, Future[Read]]] = deque()
    writing: deque[tuple[Item, Done, Future[None] | None]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="wm-pipeline")
    try:
        while True:
            while len(reading) <= AHEAD and (more := list(_take(source))):
                reading.append((more[0], pool.submit(read, more[0])))
            if reading:
                item, ready = reading.popleft()
                done = work(item, ready.result())
                writing.append((item, done, pool.submit(write, item, done) if write else None))
            while writing and (len(writing) > AHEAD or not reading):
                item, done, written = writing.popleft()
                if written is not None:
                    written.result()
                yield item, done
            if not reading and not writing:
                return
    finally:
        for _, waiting in reading:
            waiting.cancel()
        pool.shutdown(wait=True)


def _take(source: Iterator[Item]) -> Iterator[Item]:
    """The next item, if there is one."""
    for item in source:
        yield item
        return
