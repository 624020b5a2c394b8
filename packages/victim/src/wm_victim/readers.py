"""Find the reader for a data set. Nothing that is read is cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wm_victim.archives import read_npz, read_strips
from wm_victim.folders import read_folder
from wm_victim.imagenet10 import read_imagenet10
from wm_victim.raw import RawData, RawDataset, split_once
from wm_victim.torchvision_sets import TORCHVISION_SETS, read_torchvision

NAMED_SETS = (*TORCHVISION_SETS, "imagenet10")


def read_dataset(
    name: str, *, root: Path, size: int | None, download: bool, strict: bool
) -> RawDataset:
    """Read a named set, a folder or an .npz file.

    Raises:
        ValueError: No such set, or files that cannot be read as one.
    """
    if name == "digits":
        return _digits()
    named = name in NAMED_SETS
    if named and (root / f"{name}.npz").is_file():
        return read_npz(root / f"{name}.npz", name)
    if name == "imagenet10":
        return read_imagenet10(root, size, download=download)
    if named:
        if (root / f"{name}.tar").is_file():
            return read_strips(root / f"{name}.tar", name, strict=strict)
        return read_torchvision(name, root, download=download, strict=strict)
    path = Path(name)
    if path.is_dir():
        return read_folder(path, size)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path, path.stem)
    known = ", ".join(("digits", *NAMED_SETS))
    raise ValueError(f"expected a data set ({known}), a folder or an .npz file, got {name!r}")


def _digits() -> RawDataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in range(10))
    data = RawData(pixels, bunch.target.astype(np.int64))
    return split_once("digits", data, classes, first=1200, default_size=32)
