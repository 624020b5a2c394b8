"""Data sets by name, and the reader for a name or path. Nothing that is read is cached."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from wm_inject.core.images import list_images, load_image
from wm_victim.dataset_files import (
    LEAKED_CLASS,
    LEAKED_TRACK,
    Pixels,
    RawData,
    RawDataset,
    read_folder,
    read_npz,
    read_strips,
    read_tar,
    split_once,
)
from wm_victim.digits import read_digits

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Ten classes of ImageNet that are easy to tell apart, as Imagenette collects them: the folders of
# the set and their names, in the order of the labels.
IMAGENET10_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_IMAGENET10_SIDE = 224  # pixels, if no size is given


def read_dataset(
    name: str,
    *,
    root: Path,
    size: int | None,
    download: bool,
    strict: bool,
    labels: Path | None = None,
    skip_unreadable: bool = False,
) -> RawDataset:
    """Read a named set, a folder or an .npz file.

    Raises:
        ValueError: No such set, or files that cannot be read as one.
    """
    if name == "digits":
        return _digits()
    if len(parts := name.split("+")) > 1 and all(part in _NAMES for part in parts):
        reader = partial(read_dataset, root=root, size=None, download=download, strict=strict)
        return side_by_side([reader(part) for part in parts])
    named = name in (*_TORCHVISION, "imagenet10")
    if named and (root / f"{name}.npz").is_file():
        return read_npz(root / f"{name}.npz", name)
    if name == "imagenet10":
        return _imagenet10(root, _IMAGENET10_SIDE if size is None else size, download=download)
    if named:
        if (root / f"{name}.tar").is_file():
            return read_strips(root / f"{name}.tar", name, strict=strict)
        with _download_errors(name, root):
            return _TORCHVISION[name](root, download, strict)._replace(name=name)
    path = Path(name)
    if path.is_dir():
        return read_folder(path, size, labels=labels, skip_unreadable=skip_unreadable)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path, path.stem)
    known = ", ".join(_NAMES)
    raise ValueError(f"expected a data set ({known}), a folder or an .npz file, got {name!r}")


def side_by_side(sets: Sequence[RawDataset]) -> RawDataset:
    """Pictures of several sets side by side; every combination of their classes is a class.

    There are as many as the largest set has, those of a smaller one used about equally often, and
    drawn with fixed seeds. The class counts up fastest in the last set's.
    """
    side = max(data.default_size or data.train.pixels.shape[1] for data in sets)
    names = (" ".join(names) for names in product(*(data.classes for data in sets)))
    train, test = (
        _side_by_side(splits, [len(data.classes) for data in sets], side, seed)
        for seed, splits in enumerate(zip(*((d.train, d.test) for d in sets), strict=True))
    )
    name = "+".join(data.name for data in sets)
    return RawDataset(name, train, test, tuple(names), np.arange(len(train.labels)))


def _side_by_side(
    splits: Sequence[RawData], classes: Sequence[int], side: int, seed: int
) -> RawData:
    count = max(len(split.labels) for split in splits)
    channels = max(split.pixels.shape[3] for split in splits)
    pixels = np.empty((count, side, len(splits) * side, channels), np.uint8)
    labels = np.zeros(count, np.int64)
    for place, split in enumerate(splits):
        random, own = np.random.default_rng([seed, place]), len(split.labels)
        rounds = [random.permutation(own) for _ in range(-(-count // own))]
        indices = np.concatenate(rounds)[:count]
        squares = np.stack([_square(picture, side) for picture in split.pixels])
        pixels[:, :, place * side : (place + 1) * side] = squares[indices]
        labels = labels * classes[place] + split.labels[indices]
    return RawData(pixels, labels)


def _square(picture: Pixels, side: int) -> Pixels:
    """A picture ``(H, W, C)`` as ``(side, side, C)``."""
    grey = picture.shape[2] == 1
    resized = _resized(Image.fromarray(picture[..., 0] if grey else picture), side)
    return resized[..., None] if grey else resized


@contextmanager
def _download_errors(name: str, root: Path) -> Iterator[None]:
    try:
        yield
    # Missing files and no network: RuntimeError, URLError (an OSError) or EOFError.
    except (RuntimeError, OSError, EOFError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot get {name} under {root}: {detail}") from error


def _digits() -> RawDataset:
    values, labels = read_digits()
    pixels = np.round(values[..., None] * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in range(10))
    data = RawData(pixels, labels)
    return split_once("digits", data, classes, first=1200, default_size=32)


def _mnist(root: Path, download: bool, strict: bool, *, fashion: bool = False) -> RawDataset:
    from torchvision import datasets

    kind = datasets.FashionMNIST if fashion else datasets.MNIST
    parts = [kind(str(root), train=train, download=download) for train in (True, False)]
    splits = [RawData(part.data.numpy()[..., None], part.targets.numpy()) for part in parts]
    classes = tuple(parts[0].classes) if fashion else tuple(str(c) for c in range(10))
    return RawDataset("", splits[0], splits[1], classes, np.arange(len(splits[0].labels)))


def _fashion(root: Path, download: bool, strict: bool) -> RawDataset:
    return _mnist(root, download, strict, fashion=True)


def _cifar10(root: Path, download: bool, strict: bool) -> RawDataset:
    from torchvision import datasets

    # torchvision opens its pickles only after their MD5 matched the published ones.
    parts = [datasets.CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    splits = [RawData(part.data, np.array(part.targets, np.int64)) for part in parts]
    return RawDataset("", splits[0], splits[1], CIFAR10_CLASSES, np.arange(len(splits[0].labels)))


def _gtsrb(root: Path, download: bool, strict: bool) -> RawDataset:
    from torchvision import datasets

    datasets.GTSRB(str(root), split="train", download=download)
    test = datasets.GTSRB(str(root), split="test", download=download)
    files = list_images(root / "gtsrb" / "GTSRB" / "Training")
    labels = np.array([int(file.parent.name) for file in files], np.int64)
    tracks = np.array([int(file.stem.split("_")[0]) for file in files])
    keep = ~((labels == LEAKED_CLASS) & (tracks == LEAKED_TRACK)) | (not strict)
    pixels = np.stack([load_image(file, size=32) for file in files])
    test_data = RawData(
        np.stack([_resized(image, 32) for image, _ in test]),
        np.array([label for _, label in test], np.int64),
    )
    classes = tuple(str(c) for c in range(43))
    train = RawData(pixels[keep], labels[keep])
    return RawDataset("", train, test_data, classes, np.flatnonzero(keep))


_TORCHVISION: dict[str, Callable[[Path, bool, bool], RawDataset]] = {
    "mnist": _mnist,
    "fashion-mnist": _fashion,
    "cifar10": _cifar10,
    "gtsrb": _gtsrb,
}


_NAMES = ("digits", *_TORCHVISION, "imagenet10")


def _imagenet10(root: Path, size: int, *, download: bool) -> RawDataset:
    """Read imagenet10.tar (JPEG files below train/ and val/), or torchvision's Imagenette.

    Every picture is resized to a square of ``size`` pixels, whatever its aspect.
    """
    path = root / "imagenet10.tar"
    if path.is_file():
        train, test = _imagenet10_tar(path, size)
    else:
        train, test = _imagenette(root, size, download)
    classes = tuple(IMAGENET10_CLASSES.values())
    return RawDataset("imagenet10", train, test, classes, np.arange(len(train.labels)))


def _imagenet10_tar(path: Path, size: int) -> tuple[RawData, RawData]:
    try:
        files = read_tar(path)
        wnids = json.loads(files["meta.json"])["wnids"]
        if wnids != list(IMAGENET10_CLASSES):
            raise ValueError(f"expected the classes {', '.join(IMAGENET10_CLASSES)}")
        splits = []
        for split in ("train", "val"):
            names = [name for name in sorted(files) if name.startswith(f"{split}/")]
            labels = np.array([wnids.index(name.split("/")[1]) for name in names], np.int64)
            images = [Image.open(io.BytesIO(files[name]), formats=("JPEG",)) for name in names]
            pixels = np.stack([_resized(image.convert("RGB"), size) for image in images])
            splits.append(RawData(pixels, labels))
    # Pillow, tar and JSON each raise their own; all mean "not such a file".
    except Exception as error:
        raise ValueError(f"cannot read {path.name} as JPEG images: {error}") from error
    return splits[0], splits[1]


def _imagenette(root: Path, size: int, download: bool) -> tuple[RawData, RawData]:
    from torchvision.datasets import Imagenette

    folder = root / "imagenette2-320"
    with _download_errors("imagenet10", root):
        Imagenette(str(root), size="320px", download=download and not folder.is_dir())
    splits = []
    for split in ("train", "val"):
        files = list_images(folder / split)
        wnids = list(IMAGENET10_CLASSES)
        labels = np.array([wnids.index(file.parent.name) for file in files], np.int64)
        splits.append(RawData(np.stack([load_image(f, size=size) for f in files]), labels))
    return splits[0], splits[1]


def _resized(image: Image.Image, size: int) -> Pixels:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)
