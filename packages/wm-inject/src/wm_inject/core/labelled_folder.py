"""The one reader of folders with labels: class folders, tables, parts for training and testing."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from wm_inject.core.image_files import NO_IMAGE, ImageFiles, LeftOut, describe, find_images
from wm_inject.core.label_table import ImageNames, LabelTable, is_number, part_of, read_table
from wm_inject.core.plan import Labels
from wm_inject.core.text import escape, printable

_LISTED_CLASSES = 12
_TEXTS = 20  # text files in one folder that may list labels
_ANSWERS = re.compile(r"submission|predict", re.IGNORECASE)  # somebody's, not the truth
_NUMBER = re.compile(r"[+-]\d+(\.\d*)?|\d*\.\d+")


@dataclass(frozen=True, eq=False)
class LabelledFolder:
    """Images of a folder and what is known of them.

    Args:
        folder: Where they are.
        names: Their names below the folder, with "/", in the order of their parts.
        labels: int64 ``(N,)``, positions in ``classes``; None if nothing tells them.
        classes: Names of the classes. If all are numbers, each class has its own number, and those
            in between are there without images; other names are sorted.
        parts: For every image "train", "val" or "test", or "" where nothing divides them.
        layout: What was understood, in a few words.
        left_out: What lies there and is not used, or is named in a table and not there.
    """

    folder: Path
    names: tuple[str, ...]
    labels: Labels | None
    classes: tuple[str, ...]
    parts: tuple[str, ...]
    layout: str
    left_out: tuple[LeftOut, ...]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes, if they are called by more than numbers."""
        return None if all(map(is_number, self.classes)) else self.classes

    def lines(self) -> list[str]:
        """What was understood and what was left out, for people: one line or two."""
        text = f"{escape(self.folder)}: {self.layout}, {len(self.names)} images"
        counts = self._counts()
        filled = [(name, count) for name, count in counts if count]
        if 0 < len(filled) <= _LISTED_CLASSES:
            class_counts = ", ".join(f"{escape(name)} {count}" for name, count in filled)
            missing = len(counts) - len(filled)
            between = f"; {missing} of the numbers between have none" if missing else ""
            text += f" of {len(filled)} classes ({class_counts}{between})"
        elif counts:
            images = [count for _, count in filled]
            text += f" of {len(counts)} classes ({min(images)} to {max(images)} each"
            empty = [escape(name) for name, count in counts if not count]
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            text += f", none of {', '.join(empty[:5])}{more})" if empty else ")"
        parts = Counter(part for part in self.parts if part)
        text += "".join(f"; {part} {count}" for part, count in parts.items())
        return [text, *([f"left out: {describe(self.left_out)}"] if self.left_out else [])]

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON, with every file that was left out."""
        return {
            "layout": self.layout,
            "images": len(self.names),
            "classes": [{"name": escape(name), "images": count} for name, count in self._counts()],
            "parts": dict(Counter(part for part in self.parts if part)),
            "left_out": listed(self.left_out),
        }

    def subset(self, places: Iterable[int]) -> LabelledFolder:
        """Those images alone, of the same classes."""
        index = list(places)
        return LabelledFolder(
            self.folder,
            tuple(self.names[place] for place in index),
            None if self.labels is None else self.labels[index],
            self.classes,
            tuple(self.parts[place] for place in index),
            self.layout,
            self.left_out,
        )

    def _counts(self) -> list[tuple[str, int]]:
        if self.labels is None:
            return []
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return list(zip(self.classes, counts, strict=True))


def listed(files: Iterable[LeftOut]) -> list[dict[str, str]]:
    """Files and reasons, ready for JSON."""
    return [{"file": escape(file), "reason": reason} for file, reason in files]


def read_labelled_folder(folder: str | Path, *, labels: str | Path | None = None) -> LabelledFolder:
    """Find the images of a folder and their labels.

    The labels come from ``labels``, or from a table called labels (.csv, .tsv, .txt) if there is
    one; else from class folders; else, where images lie without class folders, from the tables
    there that name them with labels. Folders called train, val and test (or Training, Final_Test
    and the like) divide the images, each with labels of its own. A folder around all this is
    entered.

    Args:
        folder: The folder.
        labels: The table that says the labels, whatever it is called and wherever it lies.

    Raises:
        ValueError: No images, a table that cannot be understood, tables that contradict each
            other, or labels that are no classes.
    """
    reader = _Reader(find_images(folder))
    outer = reader.enter("")
    prefixes = _divisions(reader.found, outer)
    levels = [reader.enter(prefix) for prefix in prefixes] if prefixes else [outer]
    for prefix in prefixes:
        names = [name for name in reader.found.names if name.startswith(prefix)]
        reader.parts |= dict.fromkeys(names, part_of(prefix[len(outer.prefix) : -1]) or "")
    if labels is not None:
        reader.read_given(Path(labels))
        return reader.result()
    # Those with most class folders first: one folder alone is a class if others know its name.
    for level in sorted(levels, key=lambda level: -len(level.folders)):
        reader.read_level(level, next((p for p in prefixes if level.prefix.startswith(p)), ""))
    return reader.result()


class _Level:
    """What lies directly in one folder: images, and folders with the images below them."""

    def __init__(self, found: ImageFiles, prefix: str) -> None:
        self.prefix = prefix
        self.loose: list[str] = []
        self.folders: dict[str, list[str]] = {}
        for name in found.folders:
            inside = name[len(prefix) : -1]
            if name.startswith(prefix) and inside and "/" not in inside:
                self.folders[inside] = []
        for name in found.names:
            if name.startswith(prefix):
                head, slash, _ = name[len(prefix) :].partition("/")
                (self.folders[head] if slash else self.loose).append(name)
        # An empty folder is a class without images; one of other files alone is no class.
        for file, reason in found.left_out:
            head, slash, _ = file.removeprefix(prefix).partition("/")
            empty = not self.folders.get(head, True)
            if file.startswith(prefix) and slash and empty and reason == NO_IMAGE:
                del self.folders[head]

    def tells_classes(self, known: Iterable[str]) -> bool:
        """Whether its folders are classes; one alone is none, unless ``known`` or a number."""
        if len(self.folders) == 1:
            (head,) = self.folders
            if not (is_number(head) or head in known):
                return False
        inside = sum(map(len, self.folders.values()))
        return inside > 0 and inside >= len(self.loose)


def _divisions(found: ImageFiles, outer: _Level) -> list[str]:
    """The folders for training and testing, if that is what the folders there are."""
    parts = {head: part for head in outer.folders if (part := part_of(head))}
    inner = [_Level(found, f"{outer.prefix}{head}/") for head in parts]
    if len(set(parts.values())) < 2 and not any(len(level.folders) > 1 for level in inner):
        return []
    return [level.prefix for level in inner if level.loose or any(level.folders.values())]


class _Reader:
    """What is known of the images of one folder so far, and where it is from."""

    def __init__(self, found: ImageFiles) -> None:
        self.found = found
        self.labels: dict[str, str] = {}
        self.parts: dict[str, str] = {}
        self.class_names: dict[str, str] = {}
        self.layouts: dict[str, None] = {}
        self.empty: set[str] = set()
        self.missing: dict[str, tuple[str, ...]] = {}
        self._tables: dict[tuple[str, str], LabelTable | None] = {}

    def enter(self, prefix: str) -> _Level:
        """The level below folders that only lie around it."""
        level = _Level(self.found, prefix)
        while not level.loose and len(level.folders) == 1:
            inner = _Level(self.found, f"{level.prefix}{next(iter(level.folders))}/")
            if not any(inner.folders.values()):
                break
            level = inner
        return level

    def read_given(self, path: Path) -> None:
        """Take the labels from the table that the user names."""
        if not path.is_file():
            raise ValueError(f"expected a table of labels at {escape(path)}, found none")
        folder, at = os.path.realpath(self.found.folder), os.path.realpath(path.parent)
        below = os.path.relpath(at, folder).replace(os.sep, "/")
        at = "" if below == "." else f"{below}/"
        table = read_table(path, ImageNames(self.found.names), at)
        if table is None:
            raise _not_understood(path)
        self._take(f"{at}{path.name}", table, self.found.names)

    def read_level(self, level: _Level, part: str) -> None:
        """Take the labels of a level from its tables or its folders.

        Args:
            level: The level.
            part: The folder that divides it from others, as a prefix; "" for none.
        """
        near = self._near(level)
        first = [name for name in near if PurePath(name).stem.lower() == "labels"]
        inside = [*level.loose, *itertools.chain.from_iterable(level.folders.values())]
        for name in reversed(first):
            if table := self._fitting(name, part, inside):
                return self._take(name, table, inside)
        if level.tells_classes({*self.empty, *self.labels.values()}):
            where = f" in {escape(level.prefix)}" if level.prefix and not part else ""
            self.layouts[f"class folders{where}"] = None
            for head, names in level.folders.items():
                self.labels |= dict.fromkeys(names, head)
                self.empty |= set() if names else {head}
            return None
        for name in near:
            if table := self._fitting(name, part, inside):
                self._take(name, table, inside)
        if first and not any(name in self.labels for name in inside):
            raise _not_understood(self.found.folder / first[-1])
        return None

    def result(self) -> LabelledFolder:
        """Everything that was read, as one."""
        names = self.found.names
        left_out = [one for one in self.found.left_out if one.file not in self.missing]
        for table, missing in self.missing.items():
            reason = f"named in {escape(table)} and not there"
            left_out += [LeftOut(name, reason) for name in missing]
        if self.labels:
            left_out += [
                LeftOut(name, "without a label") for name in names if name not in self.labels
            ]
            names = tuple(name for name in names if name in self.labels)
        parts = tuple(self.parts.get(name, "") for name in names)
        classes, labels = self._number(names, parts) if self.labels else ((), None)
        layout = " and ".join(self.layouts) or "no labels"
        return LabelledFolder(
            self.found.folder, names, labels, classes, parts, layout, tuple(left_out)
        )

    def _near(self, level: _Level) -> list[str]:
        """The tables beside a level or further out; nearer ones and those of training last."""
        only = [f"{level.prefix}{head}/" for head in level.folders if len(level.folders) == 1]
        near = [
            name
            for name in self.found.tables
            if level.prefix.startswith(_folder_of(name)) or _folder_of(name) in only
        ]
        if sum(name.endswith(".txt") for name in near) > _TEXTS:  # some sets have one an image
            near = [name for name in near if not name.endswith(".txt")]
        near = [name for name in near if not _ANSWERS.search(PurePath(name).stem)]
        return sorted(near, key=lambda name: (name.count("/"), name))

    def _fitting(self, name: str, part: str, inside: Sequence[str]) -> LabelTable | None:
        """A table, if it has labels of these images and is not called after another part."""
        at, of = _folder_of(name), part_of(PurePath(name).stem)
        if part and of not in (None, part_of(part[:-1].rpartition("/")[2])):
            return None
        scope = part if of or at.startswith(part) else ""
        if (name, scope) not in self._tables:
            images = ImageNames(one for one in self.found.names if one.startswith(scope))
            self._tables[name, scope] = read_table(self.found.folder / name, images, at)
        table = self._tables[name, scope]
        return table if table and any(one in table.labels for one in inside) else None

    def _take(self, name: str, table: LabelTable, images: Sequence[str]) -> None:
        """Take over what a table says of some images.

        Raises:
            ValueError: Another table says something else.
        """
        part = part_of(PurePath(name).stem)
        for image in images:
            label = table.labels.get(image)
            if label is None:
                continue
            if self.labels.setdefault(image, label) != label:
                raise ValueError(
                    f"expected one label of {escape(image)}, {escape(name)} says {escape(label)} "
                    f"and another table {escape(self.labels[image])}: name the right one with "
                    "--labels, or call it labels.csv"
                )
            if own_part := table.parts.get(image) or (part if not self.parts.get(image) else None):
                self.parts[image] = own_part
        self.class_names |= table.class_names
        self.missing[name] = table.missing
        self.layouts[f"{escape(name)} ({table.columns})"] = None

    def _number(self, names: Sequence[str], parts: Sequence[str]) -> tuple[tuple[str, ...], Labels]:
        """Class names and label numbers: numbers stay what they are, names are sorted."""
        labels = [self.labels[name] for name in names]
        every = {*labels, *self.empty}
        kinds: dict[str, set[bool]] = {}
        for label, part in zip(labels, parts, strict=True):
            kinds.setdefault(part, set()).add(is_number(label))
        if sorted(map(sorted, kinds.values())) == [[False], [True]]:
            raise ValueError(
                f"expected the same classes in all parts of {escape(self.found.folder)}, got "
                "numbers in one and names in another"
            )
        if all(map(is_number, every)):
            count = 1 + max(map(int, every))
            classes = tuple(self.class_names.get(str(n), str(n)) for n in range(count))
            return classes, np.array([int(label) for label in labels], np.int64)
        odd = [label for label in every if not is_number(label)]
        if all(map(_NUMBER.fullmatch, odd)):
            raise ValueError(
                f"expected class labels that are names or whole numbers from 0 to 99999 in "
                f"{escape(self.found.folder)}, got {escape(odd[0])}"
            )
        if any(map(is_number, every)):
            self.layouts["numbers taken as names, since others are names"] = None
        classes = tuple(sorted(every))
        index = {label: number for number, label in enumerate(classes)}
        return classes, np.array([index[label] for label in labels], np.int64)


def _folder_of(name: str) -> str:
    return name[: name.rfind("/") + 1]


def _not_understood(path: Path) -> ValueError:
    with path.open("rb") as file:
        first = printable(file.read(80).decode("utf-8", "replace").partition("\n")[0], 80)
    return ValueError(
        f"expected columns such as file and label that name the images in {escape(path.name)}, it "
        f"begins with {first!r}; --labels names another table"
    )
