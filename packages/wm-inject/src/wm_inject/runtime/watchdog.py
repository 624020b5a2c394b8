"""Call something when a time is over, for many things at once, with one thread.

A timer thread for every run of a small model costs more than the run.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Watchdog:
    """Deadlines in a heap, and one thread, started with the first, that waits for the next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._thread: threading.Thread | None = None

    def add(self, seconds: float, call: Callable[[], None]) -> int:
        deadline = time.monotonic() + seconds
        with self._changed:
            self._next += 1
            self._calls[self._next] = call
            heapq.heappush(self._heap, (deadline, self._next))
            # After a fork the thread is gone with the parent.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="wm-watchdog", daemon=True)
                self._thread.start()
            elif self._heap[0][1] == self._next:
                self._changed.notify()
            return self._next

    def remove(self, number: int) -> None:
        with self._changed:
            self._calls.pop(number, None)
            while self._heap and self._heap[0][1] not in self._calls:
                heapq.heappop(self._heap)

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                while self._heap and self._heap[0][0] <= now:
                    call = self._calls.pop(heapq.heappop(self._heap)[1], None)
                    if call is not None:
                        call()
                self._changed.wait(self._heap[0][0] - now if self._heap else None)


_WATCHDOG = _Watchdog()


@contextmanager
def after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call ``call`` if the block takes longer than ``seconds``.

    Args:
        seconds: From now on.
        call: Must be quick and must not raise; it runs in another thread.
    """
    number = _WATCHDOG.add(seconds, call)
    try:
        yield
    finally:
        _WATCHDOG.remove(number)
