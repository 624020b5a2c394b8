"""Data sets as folders of image files: a folder per class, or a list of files and labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from wm_inject.core.images import list_images, load_image
from wm_victim.raw import Labels, Pixels, RawData, RawDataset, split_once

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")


def read_folder(path: Path, size: int | None) -> RawDataset:
    """Read labels.csv, train/ and test/, or class folders; split 80 / 20 where nothing else does.

    Raises:
        ValueError: No images, none but loose ones, or files that are no images or of many sizes.
    """
    listing = path / "labels.csv"
    if listing.is_file():
        files, names = _read_listing(listing)
    elif (path / "train").is_dir():
        train_files, train_names = _class_folders(path / "train")
        if (path / "test").is_dir():
            return _read_split_folders(path, train_files, train_names, size)
        files, names = train_files, train_names
    else:
        files, names = _class_folders(path)
    classes, labels = _number(names)
    data = RawData(_read_images(files, size), labels)
    return split_once(path.name, data, classes, first=round(0.8 * len(files)))


def _read_split_folders(
    path: Path, train_files: list[Path], train_names: list[str], size: int | None
) -> RawDataset:
    test_files, test_names = _class_folders(path / "test")
    classes, labels = _number(train_names + test_names)
    pixels = _read_images(train_files + test_files, size)
    count = len(train_files)
    return RawDataset(
        path.name,
        RawData(pixels[:count], labels[:count]),
        RawData(pixels[count:], labels[count:]),
        classes,
        np.arange(count),
    )


def _class_folders(path: Path) -> tuple[list[Path], list[str]]:
    """Every image under ``path`` and the name of the class folder that it lies in."""
    files = list_images(path)
    names = [file.relative_to(path).parts[0] for file in files]
    if any(file.parent == path for file in files):
        raise ValueError(f"expected {path} to hold one folder of images per class, or a labels.csv")
    return files, names


def _read_listing(listing: Path) -> tuple[list[Path], list[str]]:
    folder = listing.parent.resolve()
    with listing.open(newline="", encoding="utf-8") as handle:
        rows = csv.DictReader(handle)
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"expected the columns file,label in {listing.name}")
        pairs = [(folder / (row["file"] or ""), row["label"] or "") for row in rows]
    if not pairs:
        raise ValueError(f"expected at least one row in {listing.name}")
    for file, _ in pairs:
        if not file.resolve().is_relative_to(folder):
            raise ValueError(f"expected files below {folder.name} in {listing.name}, got {file}")
    return [file for file, _ in pairs], [label for _, label in pairs]


def _number(names: list[str]) -> tuple[tuple[str, ...], Labels]:
    """Class names and label numbers: numbers stay what they are, names are sorted."""
    if all(name.isascii() and name.isdigit() and len(name) <= 5 for name in names):
        numbers = np.array([int(name) for name in names], np.int64)
        return tuple(str(c) for c in range(int(numbers.max()) + 1)), numbers
    classes = tuple(sorted(set(names)))
    place = {name: index for index, name in enumerate(classes)}
    return classes, np.array([place[name] for name in names], np.int64)


def _read_images(files: list[Path], size: int | None) -> Pixels:
    """All files as one array: grey only if every file is, and of one size unless resized."""
    grey, sizes = True, set()
    for file in files:
        try:
            with Image.open(file, formats=_FORMATS) as header:
                grey = grey and header.mode in ("1", "L")
                sizes.add(header.size)
        except Exception as error:
            raise ValueError(f"cannot read {file.name} as an image: {error}") from error
    if size is None and len(sizes) > 1:
        raise ValueError(f"expected images of one size or an image_size, got {len(sizes)} sizes")
    return np.stack([load_image(file, size=size, channels=1 if grey else 3) for file in files])
