"""Copies of regular files that cannot change between a check and their use."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from wm_inject.core.text import printable
from wm_victim.loading.contract import LoadingError

_CHUNK = 2**20


def copy_regular_file(
    path: Path, copy: Path, *, max_bytes: int, untrusted_name: bool = False
) -> str:
    """Copy a regular file, and return the SHA-256 of what was copied.

    Args:
        path: The file. A link that the caller names is followed, to a regular file.
        copy: A file that does not exist yet.
        max_bytes: The largest file to copy.
        untrusted_name: The name comes from a file that is not trusted: no symbolic link is
            followed, a file with a second name (a hard link) is refused, and errors name the file.

    Raises:
        LoadingError: No such file, not a regular one, empty, too large, or a link.
    """
    prefix = f"cannot open {printable(path.name)}: " if untrusted_name else ""
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if untrusted_name else 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            reason = "a symbolic link"
        raise LoadingError(f"{prefix}{printable(reason)}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        folder = stat.S_ISDIR(status.st_mode)
        reason = "a folder; name the model file inside it" if folder else "not a regular file"
        raise LoadingError(f"{prefix}{reason}")
    with os.fdopen(fd, "rb") as file:
        if untrusted_name and status.st_nlink > 1:
            raise LoadingError(f"{prefix}a hard link to a file with another name")
        if status.st_size == 0:
            raise LoadingError(f"{prefix}the file is empty")
        if status.st_size > max_bytes:
            raise LoadingError(
                f"{prefix}{status.st_size} bytes, more than the limit of {max_bytes}"
            )
        digest, left = hashlib.sha256(), status.st_size
        with copy.open("xb") as out:
            while left and (block := file.read(min(_CHUNK, left))):
                digest.update(block)
                out.write(block)
                left -= len(block)
    if left:
        raise LoadingError(f"{prefix}the file became shorter while it was read")
    return digest.hexdigest()


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that a child wrote; no link is followed.

    Raises:
        OSError: No such file, or a link.
        ValueError: Not a regular file, or a larger one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > max_bytes:
            raise ValueError(f"expected a plain file of at most {max_bytes} bytes")
        return file.read()
