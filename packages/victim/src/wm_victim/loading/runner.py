"""Running the risky half of the work in a child that is bound, watched and not believed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from wm_victim.loading.opened import Limits, plain
from wm_victim.loading.sandbox import landlock_version

_SANDBOX = Path(__file__).with_name("sandbox.py")
_MAX_RESULT = 4 * 2**20
_MIB = 2**20
_BUSY = 3  # on a busy machine a child may wait for a processor this many times its limit


class ChildFailed(ValueError):
    """The child refused the file, broke a limit or crashed; says which."""


def sandboxed() -> bool:
    """Whether this kernel can keep a child inside its folder (Landlock)."""
    return landlock_version() >= 1


def run_child(
    job: str, folder: Path, name: str, size: int, limits: Limits, options: dict[str, Any]
) -> dict[str, Any]:
    """Let a child read ``folder/in/NAME`` and write plain results to ``folder/out``.

    Args:
        job: "state", "onnx" or "torchscript".
        folder: A scratch folder with "in" and "out".
        name: The file inside "in".
        size: Its bytes, with its external data: the limits grow with it.
        limits: Memory and time.
        options: JSON types, for the job.

    Returns:
        What the child reports, as a JSON object of unchecked content.

    Raises:
        ChildFailed: The child refused the file, took too long or too much, or died.
    """
    seconds = limits.seconds_for(size)
    settings = {
        "job": job,
        "given": str(folder / "in"),
        "name": name,
        "scratch": str(folder / "out"),
        "memory": limits.memory_for(size),
        "seconds": seconds,
        "file_bytes": 3 * size + 64 * _MIB,
        "options": options,
    }
    code = _watch(
        [sys.executable, "-I", "-B", str(_SANDBOX), json.dumps(settings)], folder, seconds
    )
    if code is None or code == -signal.SIGXCPU:
        raise ChildFailed(f"it took longer than {seconds:.0f} s to read")
    if code == -signal.SIGKILL:
        raise ChildFailed("its reader was killed, most likely for memory")
    result = _result(folder / "out" / "result.json")
    if code < 0 or result is None:
        died = f"signal {-code}" if code < 0 else f"exit code {code}, {_last_words(folder)}"
        raise ChildFailed(f"its reader crashed: {died}")
    if "refused" in result:
        raise ChildFailed(plain(result["refused"], 600))
    return result


def _watch(command: list[str], folder: Path, seconds: float) -> int | None:
    """The exit code of a command that is killed, with its group, when its time is over."""
    environment = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment |= {"MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    environment |= {"HOME": str(folder / "out"), "TMPDIR": str(folder / "out")}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with (folder / "words").open("wb") as words:
        child = subprocess.Popen(
            command,
            cwd=folder / "out",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
        )
        start = time.monotonic()
        try:
            # Not reaped before its group is killed: until then nobody else can have its number.
            while not _exited(child.pid):
                if time.monotonic() - start > seconds + min(_queued(child.pid), _BUSY * seconds):
                    break
                time.sleep(0.02)
            late = not _exited(child.pid)
        finally:
            # Also when this process is interrupted: the child never outlives the call.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return None if late else child.returncode


def _queued(pid: int) -> float:
    """Seconds that a process was ready to run and had no processor; 0 where nobody counts them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _exited(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _result(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read_plain(path, _MAX_RESULT))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_plain(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that the child wrote; no link is followed.

    Raises:
        OSError: No such file, or a link.
        ValueError: Not a regular file, or a larger one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size > max_bytes:
            raise ValueError(f"expected a plain file of at most {max_bytes} bytes")
        return file.read()


def _last_words(folder: Path) -> str:
    with (folder / "words").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 400))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return plain(lines[-1], 200) if lines else "without a word"
