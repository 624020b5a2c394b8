"""A poison plan applied to the files of a folder; no torch."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from wm_inject.core.decode import PICTURE_SUFFIXES, file_format
from wm_inject.core.labelled_folder import LabelledFolder
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.text import escape
from wm_inject.core.whole_pictures import KEPT_FORMATS


class FolderRow(NamedTuple):
    """What happens to one file; the labels are None where nobody knows them."""

    source: str  # path of the image, below the folder it comes from
    file: str  # path of the image, below the folder it goes to
    poisoned: bool
    label_before: int | None
    label_after: int | None
    id: int  # its place in the sorted list of files, which seeds per-image randomness


def list_rows(source: LabelledFolder, plan: PoisonPlan, *, whole: bool = False) -> list[FolderRow]:
    """What a static plan does to every file; where a part for training is, it chooses from that.

    Args:
        source: The files.
        plan: A static one.
        whole: Files keep their names and formats, where `save_picture` has these; else all become
            PNG.

    Raises:
        ValueError: The plan does not fit the files (without labels it must have the pool "all" and
            be "all-to-one"), or two of them would become one.
    """
    if plan.mode != "static":
        raise ValueError(f"expected a static plan, got mode {plan.mode!r}")
    labels, count = source.labels, len(source.names)
    if labels is None and (plan.pool != "all" or plan.label_map != "all-to-one"):
        raise ValueError(
            f"expected labels (class folders or a labels.csv) for pool {plan.pool!r} and label_map "
            f"{plan.label_map!r}, got none"
        )
    keeps_format = [
        whole and file_format(source.folder / name) in KEPT_FORMATS for name in source.names
    ]
    targets = [
        name if keeps else png_name(name)
        for name, keeps in zip(source.names, keeps_format, strict=True)
    ]
    sources: dict[str, str] = {}
    for name, target in zip(source.names, targets, strict=True):
        if target in sources:
            raise ValueError(
                f"expected distinct names, {escape(sources[target])} and {escape(name)} are both "
                f"{escape(target)}"
            )
        sources[target] = name
    before: list[int | None] = [None] * count
    after = list(before)
    mask = np.zeros(count, bool)
    training = np.array([part == "train" for part in source.parts])
    pool = np.flatnonzero(training if training.any() else ~training)
    mask[pool] = plan.choose(np.zeros(len(pool), np.int64) if labels is None else labels[pool])
    if labels is not None:
        changed = plan.relabel(labels, len(source.classes))
        before = labels.tolist()
        after = np.where(mask, changed, labels).tolist()
    columns = (source.names, targets, mask.tolist(), before, after)
    return [FolderRow(*row, place) for place, row in enumerate(zip(*columns, strict=True))]


def png_name(name: str) -> str:
    """The name of a picture when it is stored as PNG; what is no suffix of a picture stays."""
    path = PurePosixPath(name)
    is_suffix = path.suffix.lower() in PICTURE_SUFFIXES
    return str(path.with_suffix(".png") if is_suffix else path.with_name(f"{path.name}.png"))
