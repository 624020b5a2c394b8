"""Data sets in files: image folders, labels.csv, .npz arrays, .tar archives of image strips."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wm_inject.core.decode import UnreadableImage, read_header
from wm_inject.core.image_files import LeftOut, refuse_unread
from wm_inject.core.images import check_pixels, load_images
from wm_inject.core.labelled_folder import LabelledFolder, read_labelled_folder
from wm_inject.core.text import escape

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]

# Frames of this track of GTSRB's training set are also among its test images.
LEAKED_CLASS, LEAKED_TRACK = 14, 23


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
    source: LabelledFolder | None = None  # what was understood of a folder


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


def read_folder(
    path: Path, size: int | None, *, labels: Path | None = None, skip_unreadable: bool = False
) -> RawDataset:
    """Read what `read_labelled_folder` finds there; split 80 / 20 if no part is for testing.

    Args:
        path: The folder.
        size: Side to resize to; all images have one size if None.
        labels: A table of labels.
        skip_unreadable: Go on without images that cannot be read.

    Raises:
        ValueError: No images, no labels, images that cannot be read, or of several sizes.
    """
    source = read_labelled_folder(path, labels=labels)
    if source.labels is None:
        raise ValueError(
            f"expected labels of the images below {escape(path)}: one folder per class, or a table "
            f"(labels.csv, or --labels) with the columns file and label; {source.lines()[0]}"
        )
    testing = next((part for part in ("test", "val") if part in source.parts), None)
    source, pixels = _read_images(_without_val(source, testing), size, skip_unreadable)
    assert source.labels is not None
    data, tested = RawData(pixels, source.labels), np.array(source.parts) == testing
    if not tested.any() or tested.all():
        first = round(0.8 * len(pixels))
        return split_once(path.name, data, source.classes, first)._replace(source=source)
    train, test = (RawData(pixels[one], source.labels[one]) for one in (~tested, tested))
    ids = np.arange(len(train.labels))
    return RawDataset(path.name, train, test, source.classes, ids, source=source)


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


def _without_val(source: LabelledFolder, testing: str | None) -> LabelledFolder:
    """Without images for validation, where there are others for testing."""
    if testing != "test" or "val" not in source.parts:
        return source
    places = [place for place, part in enumerate(source.parts) if part != "val"]
    count = len(source.names) - len(places)
    return replace(source.subset(places), layout=f"{source.layout} without {count} of val")


def _read_images(
    source: LabelledFolder, size: int | None, skip_unreadable: bool
) -> tuple[LabelledFolder, Pixels]:
    """All images as one array: grey only if every one is, and of one size unless resized."""
    grey, readable, unread = True, [], []
    for place, name in enumerate(source.names):
        try:
            grey = read_header(source.folder / name).grey and grey
            readable.append(place)
        except UnreadableImage as error:
            unread.append(LeftOut(name, error.reason))
    source, total = source.subset(readable), len(source.names)
    pixels, places, more = load_images(
        source.folder, source.names, size=size, channels=1 if grey else 3
    )
    refuse_unread([*unread, *more], total, skip=skip_unreadable)
    sizes = {image.shape for image in pixels}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size or an image_size, got {len(sizes)} sizes")
    source = source.subset(places)
    return replace(source, left_out=(*source.left_out, *unread, *more)), np.stack(pixels)
