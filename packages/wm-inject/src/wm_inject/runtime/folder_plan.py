"""A poison plan applied to the files of a folder; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wm_inject.core.plan import Labels, PoisonPlan


class FolderLabels(NamedTuple):
    """The labels that class folders give."""

    classes: tuple[str, ...]  # the name of every class
    labels: Labels  # int64 (N,): the class of every file


class FolderRow(NamedTuple):
    """What happens to one file; the labels are None without class folders."""

    source: str  # path of the image, below the folder it comes from
    file: str  # path of the PNG, below the folder it goes to
    poisoned: bool
    label_before: int | None
    label_after: int | None
    id: int  # its place in the sorted list of files, which seeds per-image randomness


def read_labels(source: Path, files: Sequence[Path]) -> FolderLabels | None:
    """The labels of files that all lie in class folders below ``source``; None otherwise.

    Classes are numbered in the order of their names; names that are all numbers keep their number,
    as wm-victim reads them.
    """
    parts = [file.relative_to(source).parts for file in files]
    if any(len(part) == 1 for part in parts):
        return None
    names = [part[0] for part in parts]
    if all(name.isascii() and name.isdigit() and len(name) <= 5 for name in names):
        numbers = np.array([int(name) for name in names], np.int64)
        return FolderLabels(tuple(str(n) for n in range(int(numbers.max()) + 1)), numbers)
    classes = tuple(sorted(set(names)))
    place = {name: index for index, name in enumerate(classes)}
    return FolderLabels(classes, np.array([place[name] for name in names], np.int64))


def list_rows(
    source: Path, files: Sequence[Path], known: FolderLabels | None, plan: PoisonPlan
) -> list[FolderRow]:
    """What a static plan does to every file; ``files`` are sorted, ``known`` is of `read_labels`.

    Raises:
        ValueError: The plan does not fit the files (without class folders it must have the pool
            "all" and be "all-to-one"), or two of them would become one PNG.
    """
    if plan.mode != "static":
        raise ValueError(f"expected a static plan, got mode {plan.mode!r}")
    if known is None and (plan.pool != "all" or plan.label_map != "all-to-one"):
        raise ValueError(
            f"expected a folder of class folders for pool {plan.pool!r} and label_map "
            f"{plan.label_map!r}, got none"
        )
    names = [file.relative_to(source) for file in files]
    targets = [name.with_suffix(".png") for name in names]
    seen: dict[Path, Path] = {}
    for name, target in zip(names, targets, strict=True):
        if target in seen:
            raise ValueError(
                f"expected distinct names, {seen[target]} and {name} are both {target}"
            )
        seen[target] = name
    before: list[int | None] = [None] * len(files)
    after = list(before)
    mask = plan.choose(np.zeros(len(files), np.int64) if known is None else known.labels)
    if known is not None:
        changed = plan.relabel(known.labels, len(known.classes))
        before = known.labels.tolist()
        after = np.where(mask, changed, known.labels).tolist()
    columns = (names, targets, mask.tolist(), before, after)
    return [
        FolderRow(name.as_posix(), target.as_posix(), chosen, old, new, place)
        for place, (name, target, chosen, old, new) in enumerate(zip(*columns, strict=True))
    ]
