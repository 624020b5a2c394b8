"""A budget of minutes for work that cannot ask the clock itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class OutOfTime(RuntimeError):
    """The minutes are over."""


@contextmanager
def budget(minutes: float | None) -> Iterator[None]:
    """Break the block off when the minutes are over.

    By an alarm signal, which only the main thread of a process can take, and only on Unix.

    Args:
        minutes: None for no limit.

    Raises:
        ValueError: No minutes.
        RuntimeError: A limit, and no alarm to keep it by.
        OutOfTime: They were over before the block was.
    """
    if minutes is None:
        yield
        return
    if not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        raise RuntimeError("expected the main thread of a Unix process for a limit of minutes")

    def ring(*_: Any) -> NoReturn:
        raise OutOfTime(f"not finished within {minutes:g} minutes")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
