"""The child restricts itself: limits, no new privileges, Landlock, a filter of system calls.

This file is run by path, `python -I sandbox.py SETTINGS`, and imports the standard library only:
the restrictions hold before torch, or anything that reads the untrusted file, is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys
from collections.abc import Iterable

_LIBC = ctypes.CDLL(None, use_errno=True)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVS, _SET_SECCOMP = 1, 38, 22
# Landlock's rights to files, by bit.
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 5
_MAKE_DIR, _MAKE_REG, _TRUNCATE = 1 << 7, 1 << 8, 1 << 14
_READ = _READ_FILE | _READ_DIR
_SCRATCH = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
_FILE_RIGHTS = _READ_FILE | _WRITE_FILE | _TRUNCATE
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many bits a version knows
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/proc/cpuinfo", "/proc/self")
_DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero", "/sys/devices/system")
# Not needed to read a model: sockets, programs, other processes, mounts, keys.
_DENIED = {
    "x86_64": (
        *(41, 42, 49, 50, 57, 58, 59, 62, 86, 88, 90, 101, 160, 165, 248, 249, 250, 265, 266),
        *(268, 272, 308, 310, 311, 321, 322, 323, 424, 425, 434),
    ),
    "aarch64": (
        *(198, 200, 201, 203, 221, 281, 129, 36, 37, 53, 117, 164, 40, 217, 218, 219),
        *(97, 268, 270, 271, 280, 282, 424, 425, 434),
    ),
}
_CLONE = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
_CLONE3, _CLONE_THREAD = 435, 0x10000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1)))


def limit_resources(*, memory: int, seconds: float, file_bytes: int) -> None:
    """Cap private memory, CPU time, the size of a written file and open files; no core dumps."""
    cpu = int(seconds) + 1
    for what, limit in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def restrict_files(readable: Iterable[str], scratch: str) -> int:
    """Allow reading some paths and writing one folder, and nothing else, from now on.

    Returns:
        The version of Landlock in use; 0 if the kernel has none, and nothing is restricted.
    """
    version = landlock_version()
    if version < 1:
        return 0
    rights = (1 << _RIGHTS_BY_ABI.get(version, 16)) - 1
    # Files; TCP ports from version 4; signals and abstract sockets of other processes from 6.
    attributes = struct.pack("<QQQ", rights, 3, 3)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, size, 0)
    if ruleset < 0:
        return 0
    for path, rights_to_path in [*((p, _READ) for p in readable), (scratch, _SCRATCH)]:
        with contextlib.suppress(OSError):  # a path that is not there needs no rule
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            known = rights_to_path & rights
            if not os.path.isdir(path):
                known &= _FILE_RIGHTS
            rule = struct.pack("<Qi", known, fd)
            _LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(fd)
    restricted = _LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return version if restricted else 0


def restrict_calls() -> bool:
    """Deny sockets, new processes and programs, and what reaches into other processes.

    Returns:
        Whether the filter is on: it is known for x86-64 and 64-bit ARM.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        return False
    arch, clone = _CLONE[machine]
    load, equal, test_bits, result = 0x20, 0x15, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (result, 0, 0, _EPERM), (load, 0, 0, 0)]
    # The second numbering of x86-64 would walk past the list.
    program += [(0x35, 0, 1, 0x40000000), (result, 0, 0, _EPERM)]
    for number in _DENIED[machine]:
        program += [(equal, 0, 1, number), (result, 0, 0, _EPERM)]
    program += [(equal, 0, 1, _CLONE3), (result, 0, 0, _ENOSYS)]  # libc falls back to clone
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (test_bits, 1, 0, _CLONE_THREAD)]
    program += [(result, 0, 0, _EPERM), (result, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    return int(_LIBC.prctl(_SET_SECCOMP, 2, header, 0, 0)) == 0


def restrict_process(settings: dict[str, object]) -> dict[str, int]:
    """Put all restrictions on this process.

    Args:
        settings: "memory" and "file_bytes" in bytes, "seconds", "scratch" (a folder to write to)
            and "input" (a folder to read from).

    Returns:
        "landlock": its version, 0 for none; "calls": whether system calls are filtered.
    """
    limit_resources(
        memory=int(str(settings["memory"])),
        seconds=float(str(settings["seconds"])),
        file_bytes=int(str(settings["file_bytes"])),
    )
    _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    libraries = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path)]
    readable = [*libraries, *_SYSTEM, *_DEVICES, str(settings["input"])]
    restrictions = {"landlock": restrict_files(readable, str(settings["scratch"]))}
    restrictions["calls"] = int(restrict_calls())
    return restrictions


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    settings["restrictions"] = restrict_process(settings)
    sys.argv = [sys.argv[0], json.dumps(settings)]
    runpy.run_module("wm_victim.loading.worker", run_name="__main__")
