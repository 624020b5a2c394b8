"""Tables of labels as people have them: CSV of any habit, read against the images they name."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from wm_inject.core.decode import PICTURE_SUFFIXES
from wm_inject.core.text import escape

# Names of columns in small letters, without what is no letter or digit; the first that is there.
_FILE_COLUMNS = frozenset(
    (
        *("file", "filename", "fname", "files", "filepath", "filepaths", "path", "relativepath"),
        *("image", "images", "imagename", "imageid", "imagepath", "imagefile", "picture"),
        *("img", "imgname", "imgid", "imgpath", "id", "idcode", "name", "photo"),
    )
)
_LABEL_COLUMNS = (
    *("label", "labels", "class", "classid", "classidx", "classindex", "target", "targets", "y"),
    *("category", "categoryid", "labelid", "labelidx", "labelindex", "labelname", "classname"),
    *("categoryname", "classlabel", "labelnames", "species", "breed", "name"),
)
_NUMBER_COLUMN = re.compile(r"(class|label|category)(id|idx|index)")
_PART_COLUMNS = ("split", "subset", "dataset", "set", "partition", "part", "phase", "usage")
_PART = re.compile(
    r"(?:^|[\W_])(train|test|val|valid|validation|dev|eval|evaluation)"
    r"(?:ing|sets?|data|images|imgs|labels?)?(?=$|[\W_\d])",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(r"\A((sep=.|#[^,;\t|\r\n]*)(\r\n|\r|\n))+")  # of Excel; comments
_MAX_BYTES = 1 << 28
_SAMPLE = 200  # rows by which the reading of a table is chosen


class LabelTable(NamedTuple):
    """What a table says of the images that are there."""

    labels: dict[str, str]  # by name of the image; numbers without zeros in front or a fraction
    class_names: dict[str, str]  # of labels that are numbers, from a second column
    parts: dict[str, str]  # by name of the image: "train", "val" or "test", where a column says so
    missing: tuple[str, ...]  # what it names and is not there
    columns: str  # as they are called, for people


class ImageNames:
    """Names of images, looked up as tables write them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._last: dict[str, list[str]] = {}  # by last part, with and without suffix
        for name in names:
            key = _same(name)
            self._exact[key] = name
            last = key.casefold().rpartition("/")[2]
            stem, suffix = posixpath.splitext(last)
            for one in {last, stem} if suffix in PICTURE_SUFFIXES else {last}:
                self._last.setdefault(one, []).append(name)

    def __len__(self) -> int:
        return len(self._exact)

    def find(self, cell: str, at: str) -> list[str]:
        """The images that a cell of a table in the folder ``at`` may mean: none, one or several."""
        path = _same(cell).replace("\\", "/")
        for start in (at, ""):
            name = posixpath.normpath(posixpath.join(start, path))
            if name in self._exact:
                return [self._exact[name]]
        # Absolute paths and those from elsewhere: one has to be the end of the other.
        *folders, last = path.casefold().split("/")
        folders = [part for part in folders if part not in ("", ".", "..")]
        return [name for name in self._last.get(last, ()) if _is_end(folders, name)]


def part_of(name: str) -> str | None:
    """The part that the name of a folder, file or cell says: "train", "val" or "test"."""
    match = _PART.search(name)
    if match is None:
        return None
    return {"tra": "train", "tes": "test"}.get(match[1][:3].lower(), "val")


def is_number(label: str) -> bool:
    """Whether a label is a number of a class rather than its name."""
    return label.isascii() and label.isdigit() and len(label) <= 5


def read_table(path: Path, images: ImageNames, at: str) -> LabelTable | None:
    """Read the labels of images from a table with or without a header.

    Fields may be separated by commas, semicolons, tabs, bars or spaces; the encoding may be UTF-8,
    UTF-16 or Latin-1. Of all readings the one that names the most images is taken.

    Args:
        path: The table.
        images: The images that are there.
        at: The folder of the table as seen from that of the images, "" or with "/" behind.

    Returns:
        What it says; None if it names no image with a label.

    Raises:
        ValueError: It gives one image two labels, or a name fits several images.
        OSError: It cannot be read.
    """
    name = escape(path.name)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES} bytes in {name}")
    best: tuple[float, list[list[str]], _Columns | None] = (0.0, [], None)
    for rows in _readings(path.read_bytes()):
        score, columns = _columns(rows, rows[:_SAMPLE], images, at)
        if not score:  # of a large table, a few images that lie anywhere in it may be there
            score, columns = _columns(rows, rows, images, at)
        if score > best[0]:
            best = (score, rows, columns)
    _, rows, columns = best
    return None if columns is None else _labels(rows, columns, images, at, name)


class _Columns(NamedTuple):
    file: int
    label: int
    second: int | None  # another column of labels
    part: int | None
    header: bool


def _readings(content: bytes) -> Iterator[list[list[str]]]:
    """The rows of a table, by every encoding, separator and way of quoting that may be meant."""
    for text in _texts(content):
        text = _PREAMBLE.sub("", text)
        lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        if not lines:
            continue
        for separator in (";", "\t", ",", "|"):
            if separator not in lines[0]:
                continue
            plain = [[cell.strip().strip('"') for cell in line.split(separator)] for line in lines]
            quoted = _quoted(text, separator) if '"' in text else []
            # A stray quote would swallow all lines up to the next one.
            yield from (quoted, plain) if len(quoted) == len(plain) else (plain, quoted)
        yield [line.split() for line in lines]
        yield [line.rsplit(None, 1) for line in lines]  # names with spaces


def _quoted(text: str, separator: str) -> list[list[str]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    with suppress(csv.Error):
        return [row for row in reader if any(row)]
    return []


def _texts(content: bytes) -> Iterator[str]:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield content.decode("utf-16", "replace")
        return
    if b"\0" in content[:1024]:
        return
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield content.decode("latin-1")
        yield content.decode("utf-8-sig", "surrogateescape")  # as names of files are read


def _columns(
    rows: list[list[str]], sample: list[list[str]], images: ImageNames, at: str
) -> tuple[float, _Columns | None]:
    """Which columns are which, and the share of a sample of rows that name image and label."""
    width = len(rows[0]) if rows else 0
    if width < 2:
        return 0.0, None
    names = list(map(_plain, rows[0]))
    names_columns = any(name in _FILE_COLUMNS or name in _LABEL_COLUMNS for name in names)
    files = (
        [place for place, name in enumerate(names) if name in _FILE_COLUMNS]
        if names_columns
        else []
    )
    best, file = 0, 0
    for place in files or range(width):
        count = sum(len(row) > place and bool(images.find(row[place], at)) for row in sample)
        if count > best:
            best, file = count, place
    labels = [names.index(name) for name in _LABEL_COLUMNS if name in names]
    labels = [place for place in labels if place != file]
    numbered = [place for place in labels if _NUMBER_COLUMN.fullmatch(names[place])]
    candidates = [place for place in numbered if _all_numbers(row[place:] for row in sample[1:])]
    labels = candidates[:1] + [place for place in labels if place not in candidates[:1]]
    if not labels and width == 2:
        labels = [1 - file]
    if not best or not labels:
        return 0.0, None
    first = rows[0][file]
    header = names_columns or not (images.find(first, at) or _suffix(first) in PICTURE_SUFFIXES)
    parts = [place for place, name in enumerate(names) if name in _PART_COLUMNS and names_columns]
    second = labels[1] if len(labels) > 1 else None
    whole = [row for row in sample if len(row) > max(file, labels[0])]
    score = sum(bool(images.find(row[file], at)) for row in whole) / len(sample)
    return score, _Columns(file, labels[0], second, parts[0] if parts else None, header)


def _all_numbers(rows: Iterable[Sequence[str]]) -> bool:
    """Whether the first cells of some rows are numbers of classes."""
    return all(is_number(_label(row[0])) for row in rows if row)


def _labels(
    rows: list[list[str]], columns: _Columns, images: ImageNames, at: str, table: str
) -> LabelTable:
    labels: dict[str, str] = {}
    seconds: dict[str, str] = {}
    parts: dict[str, str] = {}
    missing: list[str] = []
    width = 1 + max(place for place in columns[:4] if place is not None)
    for row in rows[columns.header :]:
        if len(row) <= max(columns.file, columns.label):
            continue
        cells = [*row, *[""] * (width - len(row))]
        matches = images.find(cells[columns.file], at)
        if len(matches) > 1:
            raise ValueError(
                f"expected {table} to name one image by {escape(cells[columns.file])!r}, it may be "
                f"{escape(matches[0])} or {escape(matches[1])}: give the folder as well"
            )
        label = _label(cells[columns.label])
        if not matches:
            missing += [cells[columns.file]] if cells[columns.file].strip() else []
        elif label and labels.setdefault(matches[0], label) != label:
            raise ValueError(
                f"expected one label of {escape(matches[0])} in {table}, got "
                f"{escape(labels[matches[0]])} and {escape(label)}"
            )
        if matches and columns.second is not None:
            seconds[matches[0]] = _label(cells[columns.second])
        if matches and columns.part is not None and (part := part_of(cells[columns.part])):
            parts[matches[0]] = part
    numbered = columns.header and _NUMBER_COLUMN.search(_plain(rows[0][columns.label]))
    labels, names = _number_and_name(labels, seconds, counted=bool(numbered))
    header = rows[0] if columns.header else [f"column {n + 1}" for n in range(len(rows[0]))]
    columns_text = f"{escape(header[columns.file])} and {escape(header[columns.label])}"
    return LabelTable(labels, names, parts, tuple(missing), columns_text)


def _number_and_name(
    labels: dict[str, str], seconds: dict[str, str], *, counted: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Where one of two columns holds numbers and the other their names: both in their places.

    Args:
        labels: The labels that were chosen.
        seconds: Those of another column.
        counted: Whether the first ones are numbers by the name of their column.
    """
    pairs = {(labels[name], second) for name, second in seconds.items() if name in labels}
    sides = {first for first, _ in pairs}, {second for _, second in pairs}
    if not pairs or not len(sides[0]) == len(sides[1]) == len(pairs):
        return labels, {}
    first_numbers, second_numbers = (all(map(is_number, side)) for side in sides)
    if first_numbers and (counted or not second_numbers):
        return labels, dict(pairs)
    if second_numbers and not first_numbers:
        return {name: seconds[name] for name in labels}, {second: first for first, second in pairs}
    return labels, {}


def _label(cell: str) -> str:
    """A label without what surrounds it; numbers as they are counted, "" for none."""
    text = unicodedata.normalize("NFC", " ".join(cell.split())).strip("\"'")
    if re.fullmatch(r"\d{1,9}(\.0*)?", text, re.ASCII):
        return str(int(float(text)))
    return "" if text.lower() == "nan" else text


def _plain(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.lower())


def _same(name: str) -> str:
    """A name as it is compared: macOS writes an umlaut as two characters."""
    return unicodedata.normalize("NFC", name.strip().strip('"'))


def _suffix(name: str) -> str:
    return posixpath.splitext(name.strip().lower())[1]


def _is_end(folders: list[str], name: str) -> bool:
    """Whether these folders and those of an image agree, from the last one on."""
    others = _same(name).casefold().split("/")[:-1]
    return all(a == b for a, b in zip(reversed(folders), reversed(others), strict=False))
