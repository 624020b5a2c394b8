"""Run a command line in a process of its own, on a machine that lacks something.

The processes are forked from one that has imported the heavy libraries, so that each takes a
fraction of a second; a fault therefore holds from the call of ``main``, not from the first import.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = str(Path(__file__).resolve().parents[1])
if _ROOT not in sys.path:  # which the forked process takes over, to find this module
    sys.path.append(_ROOT)
_PRELOAD = ("torch", "torchvision", "onnxruntime", "scipy.stats")
_FORKS: Any = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*_PRELOAD, "wm_eval.audit.scan", "wm_victim.train", "tools.faults"])


@dataclass(frozen=True)
class Fault:
    """What a machine lacks.

    Args:
        environment: Variables to set; None removes one.
        file_bytes: The largest file that can be written, as on a full disk; None for any.
        memory: MiB beyond what the process has when it begins; None for all there is.
        encoding: Of stdout and stderr.
        stdout: "pipe" (read here), "full" (a device without room), "gone" (nobody reads).
    """

    environment: Mapping[str, str | None] = field(default_factory=dict)
    file_bytes: int | None = None
    memory: int | None = None
    encoding: str = "utf-8"
    stdout: str = "pipe"


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None  # negative: the signal that ended it
    out: str
    err: str


def run_with(
    fault: Fault,
    command: str,
    arguments: Sequence[object],
    *,
    end: Callable[[], bool] | None = None,
    timeout: float = 60.0,
) -> Ended:
    """Run ``main`` of a module such as "wm_eval.cli" under a fault.

    Args:
        end: Asked every 10 ms; SIGTERM is sent when it says yes.
        timeout: Seconds until the process is killed.
    """
    ends = [os.pipe(), os.pipe()]
    writers = [Connection(write, readable=False) for _, write in ends]
    process = _FORKS.Process(
        target=_child, args=(fault, command, [str(one) for one in arguments], *writers)
    )
    process.start()
    for writer in writers:
        writer.close()
    limit = time.monotonic() + timeout
    while process.is_alive() and time.monotonic() < limit:
        if end is not None and end():
            os.kill(process.pid, signal.SIGTERM)
            end = None
        process.join(0.01)
    if process.is_alive():
        process.kill()
    process.join()
    texts = []
    for read, _ in ends:  # what a command prints fits into a pipe
        with os.fdopen(read, "rb") as stream:
            texts.append(stream.read().decode(errors="replace"))
    return Ended(process.exitcode, *texts)


def _child(
    fault: Fault, command: str, arguments: list[str], out: Connection, err: Connection
) -> None:
    main = importlib.import_module(command).main
    for name, value in fault.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    tempfile.tempdir = None  # chosen anew, by these variables
    if fault.stdout == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif fault.stdout == "gone":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        os.close(write)
    else:
        os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    # As Python opens them at its start.
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), fault.encoding, "strict")
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", 0), fault.encoding, "backslashreplace", write_through=True
    )
    if fault.file_bytes is not None:
        _limit(resource.RLIMIT_FSIZE, fault.file_bytes)
    if fault.memory is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + fault.memory * 2**20)
    code = main(arguments)
    sys.stderr.flush()
    os._exit(code)


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))
