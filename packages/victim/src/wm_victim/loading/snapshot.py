"""One look at a file: a copy that nobody else can change, and its digest."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from wm_victim.loading.opened import NotOpened, plain

_CHUNK = 2**20


def take_snapshot(path: Path, copy: Path, *, max_bytes: int, beside: bool = False) -> str:
    """Copy a regular file, and give the SHA-256 of what was copied.

    Everything else reads the copy, so that the file cannot change between a check and its use.

    Args:
        path: The file. A link that the caller names is followed, to a regular file.
        copy: Where to, a file that is not there yet.
        max_bytes: The largest file to copy.
        beside: The name stands in a stranger's file: no symbolic link is followed, and a file that
            has a second name (a hard link) is refused.

    Raises:
        NotOpened: No such file, not a regular one, empty, too large, or a link where none may be.
    """
    name = plain(path.name)
    # O_NONBLOCK: a FIFO would otherwise wait for a writer for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if beside else 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            why = "a symbolic link"
        raise NotOpened(f"cannot open {name}: {plain(why)}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        folder = stat.S_ISDIR(found.st_mode)
        why = "a folder; name the model file inside it" if folder else "not a regular file"
        raise NotOpened(f"cannot open {name}: {why}")
    with os.fdopen(fd, "rb") as file:
        if beside and found.st_nlink > 1:
            raise NotOpened(f"cannot open {name}: a hard link to a file with another name")
        if found.st_size == 0:
            raise NotOpened(f"cannot open {name}: the file is empty")
        if found.st_size > max_bytes:
            raise NotOpened(
                f"cannot open {name}: {found.st_size} bytes, more than the limit of {max_bytes}"
            )
        digest, left = hashlib.sha256(), found.st_size
        with copy.open("xb") as out:
            while left and (block := file.read(min(_CHUNK, left))):
                digest.update(block)
                out.write(block)
                left -= len(block)
    if left:
        raise NotOpened(f"cannot open {name}: the file became shorter while it was read")
    return digest.hexdigest()
