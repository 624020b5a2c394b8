"""A zip archive's directory, checked before anything inside is used."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from pathlib import Path

_MAX_RATIO = 64
_MAX_DIRECTORY = 16 * 2**20
_END = struct.Struct("<4s4H2LH")


class BadArchive(ValueError):
    """An archive that is damaged or made to deceive; says why."""


def list_archive(path: Path, *, max_entries: int, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The records of an archive by name, after its directory has been checked.

    Raises:
        BadArchive: Too many or too large records, a record that unpacks to more than 64 times its
            size, two of one name, overlapping or encrypted ones, a link, a name that leaves the
            archive, bytes before or after it, or a directory that cannot be read.
    """
    _check_end(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise BadArchive(f"a damaged archive: {error}") from error
    if not entries or len(entries) > max_entries:
        raise BadArchive(f"an archive of {len(entries)} records, expected 1 .. {max_entries}")
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        raise BadArchive(f"an archive that unpacks to {total} bytes, more than {max_bytes}")
    for entry in entries:
        _check_entry(entry)
    names = {entry.filename: entry for entry in entries}
    # torch looks records up without regard to case.
    if len({name.lower() for name in names}) < len(entries):
        raise BadArchive("an archive with two records of one name")
    end = 0
    for entry in sorted(entries, key=lambda one: one.header_offset):
        if entry.header_offset < end:
            raise BadArchive(f"an archive whose records overlap, at {entry.filename!r}")
        end = entry.header_offset + 30 + entry.compress_size
    return names


def check_contents(path: Path) -> None:
    """Compare every record with its checksum; nothing is kept.

    Raises:
        BadArchive: A record that is damaged or longer than it says.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as record:
                    while record.read(2**20):
                        pass
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
                raise BadArchive(f"a damaged record {entry.filename!r}: {error}") from error


def _check_end(path: Path) -> None:
    """The end record must be the file's last bytes and its directory of a bearable size."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size))
        last = file.read()
    if len(last) < _END.size or last[:4] != b"PK\x05\x06":
        raise BadArchive("a truncated archive, or one with bytes behind its end")
    length, comment = _END.unpack(last)[5], _END.unpack(last)[7]
    if comment:
        raise BadArchive("a truncated archive, or one with bytes behind its end")
    # 0xFFFFFFFF sends the reader to a 64-bit record; archives that need one are too large anyway.
    if length > min(_MAX_DIRECTORY, size):
        raise BadArchive(f"an archive with a directory of {length} bytes")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.split("/")
    if name != entry.orig_filename or "\\" in name or ":" in name or not name.isprintable():
        raise BadArchive(f"an archive with the odd name {entry.orig_filename!r}")
    if name.startswith("/") or ".." in parts:
        raise BadArchive(f"an archive with a name that leaves it: {name!r}")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise BadArchive(f"an archive with a symbolic link, {name!r}")
    if entry.flag_bits & 1:
        raise BadArchive(f"an archive with an encrypted record, {name!r}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadArchive(f"an archive with an unusual compression, in {name!r}")
    if entry.file_size > _MAX_RATIO * max(entry.compress_size, 64):
        raise BadArchive(
            f"an archive bomb: {name!r} unpacks {entry.compress_size} to {entry.file_size} bytes"
        )
