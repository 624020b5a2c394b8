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
_MAX_OPCODES = 1_000_000
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# What torch writes into a dictionary of tensors, and nothing else.
ALLOWED_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
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
        LoadingError: Another global than those of a dictionary of tensors, an unusual instruction,
            too many instructions, bytes behind the end, or no pickle.
    """
    global_names: dict[str, None] = {}
    count, end = 0, -1
    try:
        for opcode, argument, position in pickletools.genops(data):
            count += 1
            if count > _MAX_OPCODES:
                raise LoadingError(f"a pickle of more than {_MAX_OPCODES} instructions")
            if opcode.name == "GLOBAL":
                global_names[str(argument)] = None
            elif opcode.name in _REFUSED_OPCODES:
                raise LoadingError(f"a pickle with the instruction {opcode.name}")
            end = position or 0
    except LoadingError:
        raise
    # pickletools raises whatever its readers meet in a damaged stream.
    except Exception as error:
        raise LoadingError(f"a damaged pickle: {error}") from error
    forbidden = [name.replace(" ", ".") for name in global_names if name not in ALLOWED_GLOBALS]
    if forbidden:
        more = f" and {len(forbidden) - 4} more" if len(forbidden) > 4 else ""
        raise LoadingError(f"its pickle asks for code: {', '.join(forbidden[:4])}{more}")
    if end != len(data) - 1:
        raise LoadingError("a pickle with bytes behind its end")


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
