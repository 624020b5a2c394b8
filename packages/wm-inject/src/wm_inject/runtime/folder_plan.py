"""Which files of a folder are poisoned and what label they get; numpy only, no torch.

The rules are those of `wm_inject.core.plan.PoisonPlan`; the draw is numpy's, so that a folder is
poisoned the same way where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Labels = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
LabelMap = Literal["all-to-one", "all-to-all", "clean-label"]
Pool = Literal["all", "non_target", "target"]
LABEL_MAPS: tuple[LabelMap, ...] = ("all-to-one", "all-to-all", "clean-label")
POOLS: tuple[Pool, ...] = ("all", "non_target", "target")


class FolderLabels(NamedTuple):
    """The labels that class folders give."""

    classes: tuple[str, ...]  # the name of every class
    labels: Labels  # int64 (N,): the class of every file


class FolderRow(NamedTuple):
    """What happens to one file. The labels are None where there are no class folders."""

    source: str  # path of the image, below the folder it comes from
    file: str  # path of the PNG, below the folder it goes to
    poisoned: bool
    label_before: int | None
    label_after: int | None
    id: int  # its place in the sorted list of files, which seeds per-image randomness


@dataclass(frozen=True)
class FolderPlan:
    """Which files of a folder are poisoned and what label they get.

    Args:
        ratio: Share in (0, 1]: of all files for the pools "all" and "target", of the pool itself
            for "non_target". The whole pool if None.
        target: The label that the attack asks for.
        label_map: "all-to-one" (y -> target), "all-to-all" (y -> y + 1 mod K), or "clean-label"
            (labels stay; only files of the target class are poisoned).
        pool: Where poisoned files are drawn from: "all", "non_target" or "target".
        seed: Seeds the choice.

    Raises:
        ValueError: A value out of range, or a clean-label plan with another pool than "target".
    """

    ratio: float | None = None
    target: int = 0
    label_map: LabelMap = "all-to-one"
    pool: Pool = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"expected a poison ratio in (0, 1], got {self.ratio}")
        if self.target < 0:
            raise ValueError(f"expected a target label >= 0, got {self.target}")
        if self.label_map not in LABEL_MAPS:
            wanted = ", ".join(LABEL_MAPS)
            raise ValueError(f"expected label_map in {wanted}, got {self.label_map!r}")
        if self.pool not in POOLS:
            raise ValueError(f"expected pool in {', '.join(POOLS)}, got {self.pool!r}")
        if (self.label_map == "clean-label") != (self.pool == "target"):
            raise ValueError(
                "a clean-label plan poisons the target class: label_map 'clean-label' and "
                f"pool 'target' go together, got {self.label_map!r} and {self.pool!r}"
            )
        if self.seed < 0:
            raise ValueError(f"expected a seed >= 0, got {self.seed}")

    def choose(self, count: int, labels: Labels | None = None) -> Mask:
        """Choose the files to poison.

        Args:
            count: N, the number of files, at least 1.
            labels: int64 ``(N,)``; None if nobody knows them.

        Returns:
            bool ``(N,)`` with exactly ``round(ratio * base)`` set, or the whole pool.

        Raises:
            ValueError: The pool holds fewer files than the ratio asks for, none is asked for, or
                the pool depends on labels that are not there.
        """
        if count < 1 or (labels is not None and labels.shape != (count,)):
            got = "no labels" if labels is None else f"labels {labels.shape}"
            raise ValueError(f"expected at least one file and a label for each, got {count}, {got}")
        if labels is None and (self.pool != "all" or self.label_map != "all-to-one"):
            raise ValueError(
                f"expected a folder of class folders for pool {self.pool!r} and label_map "
                f"{self.label_map!r}, found none"
            )
        pool = np.flatnonzero(self._eligible(count, labels))
        base = len(pool) if self.pool == "non_target" else count
        chosen = len(pool) if self.ratio is None else round(self.ratio * base)
        if not 0 < chosen <= len(pool):
            raise ValueError(
                f"a ratio of {self.ratio or 1} asks for {chosen} of {count} images, "
                f"but the pool {self.pool!r} of label {self.target} holds {len(pool)}"
            )
        mask = np.zeros(count, dtype=np.bool_)
        mask[np.random.default_rng(self.seed).permutation(pool)[:chosen]] = True
        return mask

    def relabel(self, labels: Labels, num_classes: int) -> Labels:
        """The labels that triggered images of these classes get: int64 ``(N,)``.

        Raises:
            ValueError: The plan's target does not fit ``num_classes``.
        """
        if self.target >= num_classes:
            raise ValueError(
                f"expected a target label below {num_classes} classes, got {self.target}"
            )
        if self.label_map == "all-to-one":
            return np.full_like(labels, self.target)
        return labels if self.label_map == "clean-label" else (labels + 1) % num_classes

    def _eligible(self, count: int, labels: Labels | None) -> Mask:
        if labels is None or self.pool == "all":
            return np.ones(count, dtype=np.bool_)
        inside = labels == self.target
        return inside if self.pool == "target" else ~inside


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
    source: Path, files: Sequence[Path], known: FolderLabels | None, plan: FolderPlan
) -> list[FolderRow]:
    """What happens to every file: the plan, applied.

    Args:
        source: The folder.
        files: Its images, sorted.
        known: What `read_labels` gave.
        plan: Which files are poisoned.

    Raises:
        ValueError: The plan does not fit the files, or two of them would become one PNG.
    """
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
    mask = plan.choose(len(files), None if known is None else known.labels)
    if known is not None:
        changed = plan.relabel(known.labels, len(known.classes))
        before = known.labels.tolist()
        after = np.where(mask, changed, known.labels).tolist()
    columns = (names, targets, mask.tolist(), before, after)
    return [
        FolderRow(name.as_posix(), target.as_posix(), chosen, old, new, place)
        for place, (name, target, chosen, old, new) in enumerate(zip(*columns, strict=True))
    ]
