"""Progress of long work: a bar on a terminal, at most a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TextIO, TypeVar

T = TypeVar("T")


class Progress(Generic[T]):
    """Progress of a long job: a bar on a terminal, at most a line a minute elsewhere.

    Works on an iterable (``for x in progress(xs)``) or by hand (``with progress(total=9) as p``
    and ``p.update()``).
    """

    def __init__(
        self,
        iterable: Iterable[T] | None,
        *,
        total: int | None,
        desc: str,
        interval: float,
        stream: TextIO,
        bar: Any | None,
    ) -> None:
        self.total, self.count, self.note = total, 0, ""
        self._iterable, self._desc, self._bar = iterable, desc, bar
        self._interval, self._stream = interval, stream
        self._start = self._last = time.monotonic()

    def __repr__(self) -> str:
        return f"Progress({self._desc!r}, {self.count}/{self.total or '?'})"

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more steps as done."""
        self.count += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self._write_line()

    def set_postfix(self, **values: float | str) -> None:
        """Show these values beside the count, floats with four digits."""
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        self.note = " ".join(shown)
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def _write_line(self) -> None:
        spent = time.monotonic() - self._start
        left = ""
        if self.total and self.count:
            left = f", {spent / self.count * (self.total - self.count):.0f} s left"
        line = (
            f"{self._desc} {self.count}/{self.total or '?'} after {spent:.0f} s{left} {self.note}"
        )
        self._stream.write(line.strip() + "\n")
        self._stream.flush()


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    enabled: bool = True,
    interval: float = 60.0,
    stream: TextIO | None = None,
) -> Progress[T]:
    """Show how far a long job is: a bar on a terminal, elsewhere a line every ``interval`` seconds.

    Works on an iterable, or by hand with ``update``. ``total`` is the length of the iterable if it
    has one; ``stream`` is stderr if None; nothing is shown unless ``enabled``.
    """
    stream = sys.stderr if stream is None else stream
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    bar = _open_bar(total, desc, stream) if enabled and stream.isatty() else None
    pause = interval if enabled else float("inf")
    return Progress(iterable, total=total, desc=desc, interval=pause, stream=stream, bar=bar)


def _open_bar(total: int | None, desc: str, stream: TextIO) -> Any | None:
    try:
        from tqdm import tqdm
    except ImportError:  # the base wheel comes without tqdm; lines do as well
        return None
    return tqdm(total=total, desc=desc, file=stream, leave=False, dynamic_ncols=True)
