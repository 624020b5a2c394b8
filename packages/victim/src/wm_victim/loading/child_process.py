"""Run a conversion in a child process: sandboxed, with limits, its results not trusted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from wm_inject.core.text import printable
from wm_victim.loading.contract import Limits, LoadingError
from wm_victim.loading.regular_files import read_regular_file
from wm_victim.loading.sandbox import landlock_version

_SANDBOX = Path(__file__).with_name("sandbox.py")
_MAX_RESULT = 4 * 2**20
_MIB = 2**20
_BUSY = 3  # on a busy machine a child may wait for a processor this many times its limit


def sandboxed() -> bool:
    """Whether this kernel can restrict a child to its folder (Landlock)."""
    return landlock_version() >= 1


def run_child(
    job: str, file: Path, size: int, limits: Limits, options: dict[str, Any]
) -> dict[str, Any]:
    """Let a child read a file in a folder "in" and write its results to "out" beside that.

    Args:
        job: "state", "onnx", "graph" or "torchscript".
        file: The file to read.
        size: Its bytes, with its external data: the limits grow with it.
        limits: Memory and time.
        options: JSON types, for the job.

    Returns:
        What the child reports, as a JSON object of unchecked content.

    Raises:
        LoadingError: The child refused the file, took too long or too much, or died.
    """
    seconds, folder = limits.seconds_for(size), file.parent.parent
    settings = {
        "job": job,
        "input": str(folder / "in"),
        "name": file.name,
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
        raise LoadingError(f"it took longer than {seconds:.0f} s to read")
    if code == -signal.SIGKILL:
        raise LoadingError("its reader was killed, most likely for memory")
    result = _read_result(folder / "out" / "result.json")
    if code < 0 or result is None:
        cause = f"signal {-code}" if code < 0 else f"exit code {code}, {_last_line(folder)}"
        raise LoadingError(f"its reader crashed: {cause}")
    if "refused" in result:
        raise LoadingError(printable(result["refused"], 600))
    return result


def _watch(command: list[str], folder: Path, seconds: float) -> int | None:
    """Run a command; kill its process group and return None when its time is over."""
    environment = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment |= {"MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    environment |= {"HOME": str(folder / "out"), "TMPDIR": str(folder / "out")}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with (folder / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            command,
            cwd=folder / "out",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        start = time.monotonic()
        try:
            # Reaped only after its group is killed: until then its PID cannot be reused.
            while not _exited(child.pid):
                waited = min(_queued_seconds(child.pid), _BUSY * seconds)
                if time.monotonic() - start > seconds + waited:
                    break
                time.sleep(0.02)
            late = not _exited(child.pid)
        finally:
            # Also when this process is interrupted: the child never outlives the call.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return None if late else child.returncode


def _queued_seconds(pid: int) -> float:
    """Seconds that a process was runnable without a processor; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _exited(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(read_regular_file(path, _MAX_RESULT))
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def _last_line(folder: Path) -> str:
    with (folder / "stderr").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 400))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return printable(lines[-1], 200) if lines else "with no output"
