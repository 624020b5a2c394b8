"""Exceptions as one line for people."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

from wm_inject.core.text import escape, printable

# How numpy, torch, ONNX Runtime, C++ and the loader of libraries word it.
_MEMORY = re.compile(
    "can(not|'t) allocate memory|failed to allocate|unable to allocate|bad[ _]alloc|out of memory"
    "|failed to map segment",
    re.IGNORECASE,
)
_LIMIT = 4000  # letters of a line


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library says that there was not enough memory."""
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))


def error_line(error: BaseException) -> str:
    """An exception as one printable line; one that nobody foresaw also says where it arose."""
    text = printable(error, _LIMIT)
    if out_of_memory(error):
        line = f"not enough memory ({text})" if text else "not enough memory"
        way_out = ": give fewer or smaller images, or smaller batches"
        return line if isinstance(error, ImportError) else line + way_out
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"cannot use {os.fsdecode(error.filename)}: "
        return escape(f"{name}{error.strerror}")
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError):
        return text or type(error).__name__
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f", {Path(frame.filename).name} line {frame.lineno}" for frame in place)
    return f"{type(error).__name__}: {text} (unexpected{where})"
