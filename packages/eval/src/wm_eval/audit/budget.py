"""A budget of minutes for work that cannot ask the clock itself."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_AGAIN = 5.0  # seconds until the alarm is given once more: the work may have swallowed the first
_LONGEST = 1e9  # seconds, which a timer can hold


class OutOfTime(RuntimeError):
    """The minutes are over."""


class Budget:
    """Minutes for a whole command, counted from now.

    Args:
        minutes: Above 0 and finite; None for no limit.

    Raises:
        ValueError: Other minutes.
    """

    def __init__(self, minutes: float | None = None) -> None:
        if minutes is not None and not 0 < minutes < math.inf:
            raise ValueError(f"expected minutes > 0, got {minutes}")
        self.minutes = minutes
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Break the block off when the minutes are over.

        By an alarm signal, which only the main thread of a process can take, and only on Unix.

        Raises:
            RuntimeError: A limit, and no alarm to keep it by.
            OutOfTime: They were over before the block was.
        """
        if self._end is None:
            yield
            return
        main = threading.current_thread() is threading.main_thread()
        if not main or not hasattr(signal, "setitimer"):
            raise RuntimeError("expected the main thread of a Unix process for a limit of minutes")
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTime(f"not begun: {self.minutes} minutes were over")

        def ring(*_: Any) -> NoReturn:
            raise OutOfTime(f"not finished within {self.minutes} minutes")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, min(left, _LONGEST), _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
