"""What a process that is told to end leaves behind: nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came; the exit code is 128 plus its number."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)


@contextmanager
def exits_on_signals() -> Iterator[None]:
    """Leave the block by `Terminated` on SIGTERM and SIGHUP, so that temporary files are removed.

    Only the main thread can do this, and a signal that the program handles or ignores already is
    left alone.
    """

    def leave(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break off the tidying up
        raise Terminated(number)

    handled = []
    if threading.current_thread() is threading.main_thread():
        names = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handled = [one for one in numbers if signal.getsignal(one) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
