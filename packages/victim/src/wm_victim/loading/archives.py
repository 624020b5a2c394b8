"""Zip archives and the pickles in them, checked without running or unpacking anything."""

from __future__ import annotations

import pickletools
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from wm_victim.loading.contract import LoadingError

_MAX_RATIO = 64
_MAX_DIRECTORY = 16 * 2**20
_END = struct.Struct("<4s4H2LH")
MAX_PICKLE = 64 * 2**20
_MAX_OPCODES = 1_000_000
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# What torch writes into a dictionary of tensors, and nothing else.
ALLOWED_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        # As torch wrote them in 2017, and published weights still have them.
        "torch._utils _rebuild_tensor",
        "torch.nn.parameter Parameter",
        "torch._utils _rebuild_parameter",
        "torch Size",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
# Other ways to rebuild tensors, which torch has and this project does not need.
_TENSORS = ("torch._utils _rebuild", "torch._tensor _rebuild", "torch.storage _load_from_bytes")
# Modules whose functions act on the machine. Nothing in a file is ever called; one that names such
# a function is refused all the same, so that its owner hears of it.
_ACTING = """
    os nt posix sys subprocess commands pty shutil socket runpy importlib imp pkgutil ctypes code
    codeop pdb timeit cProfile webbrowser pip pickle _pickle marshal types io builtins
    __builtin__
"""
_INERT_BUILTINS = """
    bool bytearray bytes complex dict float frozenset int list object range set slice str
    tuple
"""
# Those that name a class in a way of their own, or start code without naming a global.
_REFUSED_OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "PERSID"})
_REFUSED_OPCODES |= {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


def list_archive(path: Path, *, max_entries: int, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The records of an archive by name, after its directory has been checked.

    Raises:
        LoadingError: Too many or too large records, a record that unpacks to more than 64 times its
            size, two of one name, overlapping or encrypted ones, a link, a name that leaves the
            archive, bytes before or after it, or a directory that cannot be read.
    """
    _check_end(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise LoadingError(f"a damaged archive: {error}") from error
    if not entries or len(entries) > max_entries:
        raise LoadingError(f"an archive of {len(entries)} records, expected 1 .. {max_entries}")
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        raise LoadingError(f"an archive that unpacks to {total} bytes, more than {max_bytes}")
    for entry in entries:
        _check_entry(entry)
    names = {entry.filename: entry for entry in entries}
    # torch looks records up without regard to case.
    if len({name.lower() for name in names}) < len(entries):
        raise LoadingError("an archive with two records of one name")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise LoadingError(f"an archive whose records overlap, at {entry.filename!r}")
        end = entry.header_offset + 30 + entry.compress_size
    return names


def check_contents(path: Path) -> None:
    """Compare every record with its checksum; raise ``LoadingError`` for a damaged one."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as record:
                    while record.read(2**20):
                        pass
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
                raise LoadingError(f"a damaged record {entry.filename!r}: {error}") from error


def check_pickle(data: bytes) -> None:
    """Refuse a pickle that would do anything but describe tensors.

    Args:
        data: The whole pickle.

    Raises:
        LoadingError: Another global than those of a dictionary of tensors, or as `foreign_globals`.
    """
    if names := foreign_globals(data):
        raise _asks_for_code(names)


def foreign_globals(data: bytes) -> list[str]:
    """Check a pickle; the classes and functions, as "module.name", that no tensor needs.

    Args:
        data: The whole pickle.

    Raises:
        LoadingError: A global that acts on the machine, or that rebuilds tensors in another than
            the plain way; an unusual instruction, too many of them, bytes behind the end, or no
            pickle.
    """
    names, end = _read(data)
    foreign = [name for name in names if name not in ALLOWED_GLOBALS]
    if "torch._utils _rebuild_qtensor" in foreign:
        raise LoadingError("quantised weights, which have no gradients; save them in float32")
    if acting := [name for name in foreign if _acts(name) or name.startswith(_TENSORS)]:
        raise _asks_for_code([name.replace(" ", ".") for name in acting])
    if end != len(data) - 1:
        raise LoadingError("a pickle with bytes behind its end")
    return [name.replace(" ", ".") for name in foreign]


def legacy_pickles(path: Path) -> list[tuple[int, int]]:
    """Where the five pickles of torch's form without an archive begin and end.

    They are a signature, a version, a description of the machine, the weights, and the order of the
    storages, whose bytes follow.

    Raises:
        LoadingError: A damaged file, or code in one of the five but the fourth.
    """
    spans = []
    with path.open("rb") as file:
        for number in range(5):
            start = file.tell()
            data = file.read(MAX_PICKLE)
            stop = _read(data)[1] + 1
            if number != 3:
                check_pickle(data[:stop])
            spans.append((start, start + stop))
            file.seek(start + stop)
    return spans


def _asks_for_code(names: list[str]) -> LoadingError:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return LoadingError(f"its pickle asks for code: {', '.join(names[:4])}{more}")


def _acts(name: str) -> bool:
    module, _, function = name.partition(" ")
    root = module.partition(".")[0]
    return root in _ACTING.split() and not (
        root.strip("_")[:7] == "builtin" and function in _INERT_BUILTINS.split()
    )


def _read(data: bytes) -> tuple[list[str], int]:
    """The globals that a pickle names, and the position of its last instruction."""
    names: dict[str, None] = {}
    count, end = 0, -1
    try:
        for opcode, argument, position in pickletools.genops(data):
            count += 1
            if count > _MAX_OPCODES:
                raise LoadingError(f"a pickle of more than {_MAX_OPCODES} instructions")
            if opcode.name == "GLOBAL":
                names[str(argument)] = None
            elif opcode.name in _REFUSED_OPCODES:
                raise LoadingError(f"a pickle with the instruction {opcode.name}")
            end = position or 0
    except LoadingError:
        raise
    # pickletools raises whatever its readers meet in a damaged stream.
    except Exception as error:
        raise LoadingError(f"a damaged pickle: {error}") from error
    return list(names), end


def _check_end(path: Path) -> None:
    """Refuse bytes behind the end record, and a directory that is too large."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size))
        last = file.read()
    if len(last) < _END.size or last[:4] != b"PK\x05\x06":
        raise LoadingError("a truncated archive, or one with bytes behind its end")
    length, comment = _END.unpack(last)[5], _END.unpack(last)[7]
    if comment:
        raise LoadingError("a truncated archive, or one with bytes behind its end")
    # 0xFFFFFFFF sends the reader to a 64-bit record; archives that need one are too large anyway.
    if length > min(_MAX_DIRECTORY, size):
        raise LoadingError(f"an archive with a directory of {length} bytes")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.split("/")
    if name != entry.orig_filename or "\\" in name or ":" in name or not name.isprintable():
        raise LoadingError(f"an archive with the odd name {entry.orig_filename!r}")
    if name.startswith("/") or ".." in parts:
        raise LoadingError(f"an archive with a name that leaves it: {name!r}")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise LoadingError(f"an archive with a symbolic link, {name!r}")
    if entry.flag_bits & 1:
        raise LoadingError(f"an archive with an encrypted record, {name!r}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise LoadingError(f"an archive with an unusual compression, in {name!r}")
    if entry.file_size > _MAX_RATIO * max(entry.compress_size, 64):
        raise LoadingError(
            f"an archive bomb: {name!r} unpacks {entry.compress_size} to {entry.file_size} bytes"
        )
