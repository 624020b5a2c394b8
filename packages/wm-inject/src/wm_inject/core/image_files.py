"""The images below a folder, found by content, and all that is left out there, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wm_inject.core.decode import PICTURE_SUFFIXES, is_picture
from wm_inject.core.text import escape

NO_IMAGE, HIDDEN, SYSTEM = "no image", "hidden", "of the operating system"
_SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "lost+found", "__pycache__"}
    | {"$recycle.bin", "system volume information"}
)
_REASONS = 6  # that are spelt out in a line
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt")


class LeftOut(NamedTuple):
    """A file or folder that is not used, and why."""

    file: str  # as named below the folder, with "/"; a folder ends in "/"
    reason: str


class ImageFiles(NamedTuple):
    """What lies below a folder; all names are as below it, with "/", in the order of their parts.

    A file that has the name or the content of a picture is an image here, whether or not it can be
    read.
    """

    folder: Path
    names: tuple[str, ...]
    folders: tuple[str, ...]  # each ends in "/"
    tables: tuple[str, ...]  # files that may list labels; they are left out as well
    left_out: tuple[LeftOut, ...]

    @property
    def paths(self) -> list[Path]:
        """The images."""
        return [self.folder / name for name in self.names]


def find_images(folder: str | Path) -> ImageFiles:
    """Look through a folder and its sub-folders, links to folders included, each folder once.

    Raises:
        ValueError: No such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, found none at {escape(folder)}")
    names: list[str] = []
    folders: list[str] = []
    tables: list[str] = []
    left_out: list[LeftOut] = []
    top = os.path.realpath(root)
    real_folders: set[str] = set()
    # Links wait until all real folders are listed, so that those are read under their own names.
    pending, links = [("", top)], list[tuple[str, str]]()
    while pending or links:
        below, real = pending.pop() if pending else links.pop(0)
        if real in real_folders or (real != top and _contains(real, top)):
            left_out.append(LeftOut(below, "a link to a folder that is read already"))
            continue
        real_folders.add(real)
        if below:
            folders.append(below)
        try:
            with os.scandir(root / below) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            left_out.append(LeftOut(below or "./", error.strerror or "cannot be listed"))
            continue
        for entry in entries:
            name, link = below + entry.name, entry.is_symlink()
            suffix = os.path.splitext(entry.name)[1].lower()
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir()
            if reason := _unwanted(entry.name):
                left_out.append(LeftOut(name + "/" * is_folder, reason))
            elif is_folder:
                real_path = os.path.realpath(entry.path) if link else f"{real}{os.sep}{entry.name}"
                (links if link else pending).append((name + "/", real_path))
            elif suffix in PICTURE_SUFFIXES or is_picture(entry.path):
                names.append(name)
            else:
                left_out.append(LeftOut(name, NO_IMAGE))
                if suffix in _TABLE_SUFFIXES:
                    tables.append(name)
    if not names:
        remark = f"; left out: {describe(left_out)}" if left_out else ""
        raise ValueError(f"expected images below {escape(folder)}, found none{remark}")
    return ImageFiles(
        root,
        tuple(sorted(names, key=_parts)),
        tuple(sorted(folders, key=_parts)),
        tuple(sorted(tables, key=_parts)),
        tuple(sorted(left_out, key=lambda one: _parts(one.file))),
    )


def describe(files: Iterable[LeftOut]) -> str:
    """Files by their commonest reasons, in one line: how many, and the first names."""
    groups: dict[str, list[str]] = {}
    for file, reason in files:
        groups.setdefault(reason, []).append(file)
    common = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [
        f"{len(names)} {reason} ({', '.join(map(escape, names[:3]))}{', ...' * (len(names) > 3)})"
        for reason, names in common[:_REASONS]
    ]
    others = sum(len(names) for _, names in common[_REASONS:])
    return "; ".join([*lines, *([f"{others} for other reasons"] if others else [])])


def refuse_unread(unread: Iterable[LeftOut], count: int, *, skip: bool) -> None:
    """Refuse images that could not be read, all in one line, or the lack of any that could.

    Args:
        unread: Those files, with their reasons.
        count: How many files there are.
        skip: Whether the others are used without them.

    Raises:
        ValueError: Some cannot be read and are not to be skipped, or none can be read.
    """
    files = list(unread)
    if files and (not skip or len(files) == count):
        hint = "" if skip else "; --skip-unreadable goes on without them"
        raise ValueError(f"cannot read {len(files)} of {count} images: {describe(files)}{hint}")


def _unwanted(name: str) -> str | None:
    if name.lower() in _SYSTEM_NAMES or name == ".DS_Store":
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def _contains(folder: str, other: str) -> bool:
    return other.startswith(folder.rstrip(os.sep) + os.sep)


def _parts(name: str) -> list[str]:
    return name.split("/")
