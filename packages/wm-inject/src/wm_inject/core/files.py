"""Writing files so that a reader never meets half of one, and a full disk is one clear line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LONG = 200  # bytes of a name; with what a temporary one adds, file systems take 255


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` if the block succeeds.

    The folder is made if it is missing; if the block raises, ``path`` stays as it was.

    Raises:
        OSError: As for `disk_errors`.
    """
    path = Path(path)
    stem = path.stem
    if len(os.fsencode(path.name)) > _LONG:
        stem = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    # The suffix stays last: some writers choose the format by it.
    part = path.with_name(f".{stem}.part{os.getpid()}{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name the file that a block could not write.

    Raises:
        OSError: One line, in place of whatever the writing library raised where the disk is full
            or read-only, or where the permission is missing.
    """
    try:
        yield
    except Exception as error:
        reason = _refusal(error, path)
        if reason is None:
            raise
        raise OSError(f"cannot write {path}: {reason}") from error


def _refusal(error: Exception, path: Path) -> str | None:
    """Why nothing could be written; None for an error of another kind or about another file."""
    if isinstance(error, OSError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        ours = not name or ".part" in name or Path(name) in (path, *path.parents)
        reason = f"{name} is no folder" if isinstance(error, FileExistsError) else error.strerror
        return (reason or str(error)) if ours else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    if type(error).__name__ == "SafetensorError" and number:
        return os.strerror(int(number[1]))
    return None


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is missing, against other processes that would write to it.

    Raises:
        OSError: Another process holds it, or it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is writing to {folder}: wait for it") from error
        except OSError:  # a network's file system without locks
            pass
        yield
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8 with the line ends that it has, atomically.

    What UTF-8 cannot hold, bytes of file names of another encoding, is written as an escape.
    """
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV in UTF-8, as `write_text` does."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(header)
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically.

    Raises:
        ValueError: The value holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
