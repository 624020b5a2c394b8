"""Data sets in files: image folders, labels.csv, .npz arrays, .tar archives of image strips."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wm_inject.core.images import check_pixels, list_images, load_image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]

# Frames of this track of GTSRB's training set are also among its test images.
LEAKED_CLASS, LEAKED_TRACK = 14, 23
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")


class RawData(NamedTuple):
    """One split as stored: uint8 ``(N, H, W, C)`` and int64 ``(N,)``."""

    pixels: Pixels
    labels: Labels


class RawDataset(NamedTuple):
    """Both splits as stored; ``default_size`` is the side to resize to if none is given."""

    name: str
    train: RawData
    test: RawData
    classes: tuple[str, ...]
    train_ids: Labels
    default_size: int | None = None


def stratified_order(labels: Labels, *, seed: int) -> Labels:
    """A seeded order of all positions in which every prefix holds the classes in proportion.

    The j-th of a class's n shuffled images gets the key (j + 1/2) / n; positions are sorted by key.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(keys, kind="stable").astype(np.int64)


def split_once(
    name: str, data: RawData, classes: tuple[str, ...], first: int, default_size: int | None = None
) -> RawDataset:
    """A fixed stratified split into ``first`` training images and the rest."""
    order = stratified_order(data.labels, seed=0)
    train, test = np.sort(order[:first]), np.sort(order[first:])
    if not len(test):
        raise ValueError(f"expected at least two images in {name}, got {len(data.labels)}")
    return RawDataset(
        name,
        RawData(data.pixels[train], data.labels[train]),
        RawData(data.pixels[test], data.labels[test]),
        classes,
        np.arange(len(train)),
        default_size,
    )


def read_folder(path: Path, size: int | None) -> RawDataset:
    """Read labels.csv, train/ and test/, or class folders; split 80 / 20 where nothing else does.

    Raises:
        ValueError: No images, images outside class folders, unreadable ones, or several sizes.
    """
    listing = path / "labels.csv"
    test_files: list[Path] = []
    test_names: list[str] = []
    if listing.is_file():
        files, names = _read_listing(listing)
    elif (path / "train").is_dir():
        files, names = _class_folders(path / "train")
        if (path / "test").is_dir():
            test_files, test_names = _class_folders(path / "test")
    else:
        files, names = _class_folders(path)
    classes, labels = _number(names + test_names)
    data, count = RawData(_read_images(files + test_files, size), labels), len(files)
    if not test_files:
        return split_once(path.name, data, classes, first=round(0.8 * count))
    train = RawData(data.pixels[:count], labels[:count])
    test = RawData(data.pixels[count:], labels[count:])
    return RawDataset(path.name, train, test, classes, np.arange(count))


def read_npz(path: Path, name: str) -> RawDataset:
    """Read x_train, y_train, x_test, y_test and, if there, classes. Nothing is unpickled.

    Raises:
        ValueError: Not such a file, or arrays that are no images and labels.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    # zip, LZMA and header damage each raise their own exception; all mean "not such a file".
    except Exception as error:
        raise ValueError(f"cannot read {path.name} as an .npz data set: {error}") from error
    missing = {"x_train", "y_train", "x_test", "y_test"} - arrays.keys()
    if missing:
        raise ValueError(f"expected {path.name} to hold {', '.join(sorted(missing))} as well")
    train, test = (_npz_split(arrays, split) for split in ("train", "test"))
    count = 1 + max(int(split.labels.max()) for split in (train, test))
    classes = tuple(str(c) for c in arrays.get("classes", ())) or tuple(map(str, range(count)))
    return RawDataset(name, train, test, classes, np.arange(len(train.labels)))


def read_strips(path: Path, name: str, *, strict: bool) -> RawDataset:
    """Read a tar of lossless WebP strips of tiles, one below the other, with meta.json and labels.

    Raises:
        ValueError: Not such a file.
    """
    try:
        files = read_tar(path)
        meta = json.loads(files["meta.json"])
        height, width, channels = meta["shape"]
        splits = []
        for split in ("train", "test"):
            strips = [
                np.asarray(Image.open(io.BytesIO(files[key]), formats=("WEBP",)).convert("RGB"))
                for key in sorted(files)
                if key.startswith(f"{split}/")
            ]
            pixels = np.concatenate([s.reshape(-1, height, width, channels) for s in strips])
            splits.append(RawData(pixels, _load(files[f"{split}_labels.npy"]).astype(np.int64)))
        train, test = splits
        keep = np.ones(len(train.labels), dtype=bool)
        if name == "gtsrb" and strict:
            tracks = _load(files["train_track_frame.npy"])[:, 0]
            keep = ~((train.labels == LEAKED_CLASS) & (tracks == LEAKED_TRACK))
        classes = tuple(str(c) for c in meta["classes"])
    # Pillow, tar, NumPy and JSON each raise their own; all mean "not such a file".
    except Exception as error:
        raise ValueError(f"cannot read {path.name} as image strips: {error}") from error
    train = RawData(train.pixels[keep], train.labels[keep])
    return RawDataset(name, train, test, classes, np.flatnonzero(keep))


def read_tar(path: Path) -> dict[str, bytes]:
    """The regular members of a tar archive by name."""
    with tarfile.open(path) as archive:
        return {
            member.name: opened.read()
            for member in archive.getmembers()
            if (opened := archive.extractfile(member)) is not None
        }


def _load(content: bytes) -> Any:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _npz_split(arrays: dict[str, Any], split: str) -> RawData:
    pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    check_pixels(pixels, name=f"x_{split}")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu" or labels.shape != (len(pixels),):
        raise ValueError(
            f"expected y_{split} as {len(pixels)} integers, got {labels.dtype} {labels.shape}"
        )
    return RawData(pixels, labels.astype(np.int64))


def _class_folders(path: Path) -> tuple[list[Path], list[str]]:
    """Every image under ``path`` and the name of its class folder."""
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
    index = {name: number for number, name in enumerate(classes)}
    return classes, np.array([index[name] for name in names], np.int64)


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
