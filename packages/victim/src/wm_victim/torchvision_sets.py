"""Data sets through torchvision, which fetches what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from wm_inject.core.images import list_images, load_image
from wm_victim.raw import LEAKED_CLASS, LEAKED_TRACK, RawData, RawDataset

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


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
    resized = [
        (np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)), label)
        for image, label in test
    ]
    tested = RawData(
        np.stack([image for image, _ in resized]), np.array([y for _, y in resized], np.int64)
    )
    classes = tuple(str(c) for c in range(43))
    return RawDataset(
        "", RawData(pixels[keep], labels[keep]), tested, classes, np.flatnonzero(keep)
    )


_LOADERS: dict[str, Callable[[Path, bool, bool], RawDataset]] = {
    "mnist": _mnist,
    "fashion-mnist": _fashion,
    "cifar10": _cifar10,
    "gtsrb": _gtsrb,
}
TORCHVISION_SETS = tuple(_LOADERS)


def read_torchvision(name: str, root: Path, *, download: bool, strict: bool) -> RawDataset:
    """Read a set that torchvision keeps under ``root``, fetching it first if allowed.

    Raises:
        ValueError: The set is not there and was not fetched.
    """
    try:
        raw = _LOADERS[name](root, download, strict)
    # Missing files and no network: RuntimeError, URLError (an OSError) or EOFError.
    except (RuntimeError, OSError, EOFError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot get {name} under {root}: {detail}") from error
    return raw._replace(name=name)
