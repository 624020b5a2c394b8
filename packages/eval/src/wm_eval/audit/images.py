"""The clean images that an audit looks with: some of a folder's, each read right or named."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wm_inject import list_images, load_image, to_float
from wm_inject.runtime.folder_plan import read_labels

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

MIN_IMAGES = 20  # fewer say nothing of ten classes


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Clean images of a folder, and what is known of them.

    Args:
        labels: int64 ``(N,)``; None if nobody knows them.
        files: Their names below the folder.
        skipped: Names of files that could not be read, each with the reason.
    """

    images: Tensor
    labels: Tensor | None
    files: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def read_clean(
    folder: str | Path,
    *,
    size: int,
    channels: int,
    count: int = 500,
    labels: str | Path | None = None,
    seed: int = 0,
) -> CleanImages:
    """Read up to ``count`` images of a folder, drawn by the seed, in the order of their names.

    Args:
        folder: Class folders, or images without labels; sub-folders are searched.
        size: Side they are resized to.
        channels: 1 or 3.
        count: At most so many.
        labels: A CSV file with the columns "file" and "label" (a number); class folders if None.

    Raises:
        ValueError: No such folder, too few readable images, or labels that do not fit.
    """
    folder = Path(folder)
    if count < MIN_IMAGES:
        raise ValueError(f"expected a count of at least {MIN_IMAGES} images, got {count}")
    files = list_images(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    known = _labels(folder, files, names, labels)
    pixels: list[Pixels] = []
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    for place in np.random.default_rng(seed).permutation(len(files)):
        if len(pixels) == count:
            break
        try:
            pixels.append(load_image(files[place], size=size, channels=channels))
            kept.append(int(place))
        except ValueError as error:
            skipped.append((names[place], str(error)))
    if len(kept) < MIN_IMAGES:
        raise ValueError(
            f"expected at least {MIN_IMAGES} readable images in {folder}, found {len(kept)}"
        )
    order = np.argsort(kept)
    chosen = [kept[place] for place in order]
    return CleanImages(
        to_float(np.stack([pixels[place] for place in order])),
        None if known is None else torch.from_numpy(known[chosen]),
        tuple(names[place] for place in chosen),
        tuple(sorted(skipped)),
    )


def _labels(
    folder: Path, files: Sequence[Path], names: Sequence[str], table: str | Path | None
) -> np.ndarray | None:
    if table is None:
        found = read_labels(folder, files)
        return None if found is None else found.labels
    path = Path(table)
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = {row["file"]: int(row["label"]) for row in csv.DictReader(stream)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a CSV file with columns file and label (a number) at {path.name}: {error}"
        ) from error
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"expected a label for every image in {path.name}, none for {missing[0]}")
    return np.array([rows[name] for name in names], np.int64)
