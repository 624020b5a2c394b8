"""Labelled image sets, from a name, a folder or an .npz file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from wm_inject.core.images import check_images, check_labels, quantize, to_float
from wm_inject.core.labelled_folder import LabelledFolder
from wm_victim.dataset_files import Labels, Pixels, RawData, stratified_order
from wm_victim.named_datasets import read_dataset

# A mirrored 2 is no digit, and a mirrored "turn left" is another sign.
MIRROR_CHANGES_LABEL = frozenset({"digits", "mnist", "gtsrb"})


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, with an id per image that never changes.

    ``ids`` are positions in the stored set (test follows train), whatever subset is taken.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        check_images(self.images)
        check_labels(self.labels, len(self.images))
        if not isinstance(self.ids, Tensor) or self.ids.shape != self.labels.shape:
            raise ValueError(f"expected {len(self.labels)} ids, one for every image")
        if self.ids.dtype != torch.int64:
            raise ValueError(f"expected ids as an int64 tensor, got {self.ids.dtype}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = " x ".join(str(side) for side in self.images.shape[1:])
        return f"ImageSet({len(self)} images of {shape} on {self.images.device})"

    def subset(self, index: Tensor) -> ImageSet:
        """The images at ``index``, a vector of int64 positions or a bool mask; at least one."""
        if not isinstance(index, Tensor) or index.ndim != 1:
            raise ValueError("expected a vector of positions or a mask as the subset's index")
        if index.dtype == torch.bool:
            fits = len(index) == len(self)
        else:
            fits = index.dtype == torch.int64 and not bool(
                (index < 0).any() or (index >= len(self)).any()
            )
        if not fits:
            raise ValueError(f"expected int64 positions below {len(self)} or a mask that long")
        index = index.to(self.labels.device)
        return ImageSet(self.images[index], self.labels[index], self.ids[index])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.ids.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training set and a test set of the same classes.

    ``fingerprint`` is a SHA-256 over the pixels and labels of both, after resizing and ``limit``:
    two runs with the same fingerprint saw the same data.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    fingerprint: str
    source: LabelledFolder | None = None  # what was understood, if it is from a folder

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """C: 1 for grey, 3 for RGB."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """H, which is W."""
        return self.train.images.shape[2]


def load_dataset(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    classes: Sequence[int] | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = True,
    strict: bool = True,
    labels: str | Path | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Load a data set by name, or from a folder of images or an .npz file.

    Args:
        name_or_path: "digits" (scikit-learn's bundled 1,797 real scans, enlarged from 8 x 8 to
            32 x 32, split 1200 / 597), "mnist", "fashion-mnist", "cifar10", "gtsrb", "imagenet10"
            (ten classes of ImageNet, those of Imagenette), or several of these as in "gtsrb+mnist",
            whose pictures stand side by side and whose classes are all combinations; or a folder
            as `read_labelled_folder` takes it (class folders, or a table of files and labels; with
            ``train/`` and ``test/``, or split 80 / 20 here); or an .npz with x_train, y_train,
            x_test, y_test (uint8 ``(N, H, W)`` or ``(N, H, W, C)`` and integers).
        root: Folder of named sets: NAME.npz, NAME.tar (lossless strips; JPEG files for imagenet10)
            or torchvision's files. The environment variable WM_DATA if None, else
            ~/.cache/wm/data.
        classes: Keep these, by index, and number them in this order; all if None.
        image_size: Resize to this many pixels a side (bilinear, then back on the 8-bit grid);
            the set's own size if None.
        limit: Keep the first ``limit`` of a seeded, stratified order of the training images, so a
            larger limit contains every smaller one.
        seed: Of that order; split and test set do not depend on it.
        download: Let torchvision fetch a set that ``root`` does not hold.
        strict: Leave out GTSRB's training track 23 of class 14, whose frames are also among the
            test images (eight of them, in the published set).
        labels: The table of a folder's labels, where its own names and places do not tell.
        skip_unreadable: Go on without files of a folder that cannot be read.

    Raises:
        ValueError: No such set, unreadable files, fewer than two of its classes, non-square images
            without ``image_size``, or a limit outside 1 .. N.
    """
    root = Path(root or os.environ.get("WM_DATA") or Path.home() / ".cache" / "wm" / "data")
    if image_size is not None and not 4 <= image_size <= 1024:
        raise ValueError(f"expected image_size in 4 .. 1024, got {image_size}")
    raw = read_dataset(
        str(name_or_path),
        root=root,
        size=image_size,
        download=download,
        strict=strict,
        labels=None if labels is None else Path(labels),
        skip_unreadable=skip_unreadable,
    )
    train, test, ids, names = raw.train, raw.test, raw.train_ids, raw.classes
    for split in (train, test):
        check_labels(torch.from_numpy(split.labels), len(split.pixels), num_classes=len(names))
    test_ids = np.arange(len(test.labels)) + len(train.labels)
    if classes is not None:
        _check_classes(classes, len(names))
        names = tuple(names[k] for k in classes)
        train, ids = _of_classes(train, ids, classes)
        test, test_ids = _of_classes(test, test_ids, classes)
    if limit is not None:
        if not 1 <= limit <= len(train.labels):
            raise ValueError(f"expected a limit in 1 .. {len(train.labels)}, got {limit}")
        keep = stratified_order(train.labels, seed=seed)[:limit]
        train, ids = RawData(train.pixels[keep], train.labels[keep]), ids[keep]
    size = image_size or raw.default_size
    train = RawData(_resize(train.pixels, size), train.labels)
    test = RawData(_resize(test.pixels, size), test.labels)
    return Dataset(
        name=raw.name,
        train=_image_set(train, torch.from_numpy(ids)),
        test=_image_set(test, torch.from_numpy(test_ids)),
        classes=names,
        fingerprint=_fingerprint(train, test),
        source=raw.source,
    )


def defender_subset(
    train: ImageSet, *, share: float | None = None, count: int | None = None, seed: int
) -> ImageSet:
    """The few clean images of a defender: a seeded, stratified draw without replacement.

    Args:
        train: The images to draw from.
        share: Share of ``train`` in (0, 1]; give either this or ``count``.
        count: How many images, 1 .. N.
    """
    if (share is None) == (count is None):
        raise ValueError("expected either share or count of the defender's images")
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"expected a share in (0, 1], got {share}")
        count = max(1, round(share * len(train)))
    assert count is not None
    if not 1 <= count <= len(train):
        raise ValueError(f"expected a count in 1 .. {len(train)}, got {count}")
    order = stratified_order(train.labels.cpu().numpy(), seed=seed)
    return train.subset(torch.from_numpy(order[:count]))


def _check_classes(classes: Sequence[int], known: int) -> None:
    """Raise ``ValueError`` for anything but two or more different ones below ``known``."""
    different = len(set(classes)) == len(classes) >= 2
    if not different or not all(0 <= label < known for label in classes):
        raise ValueError(f"expected two or more different classes below {known}, got {classes}")


def _of_classes(data: RawData, ids: Labels, classes: Sequence[int]) -> tuple[RawData, Labels]:
    """The images of some classes, numbered in this order, and their ids; at least one of each."""
    number = np.full(max(int(data.labels.max()), *classes) + 1, -1)
    number[list(classes)] = np.arange(len(classes))
    labels = number[data.labels]
    if missing := set(range(len(classes))) - set(labels.tolist()):
        raise ValueError(f"expected images of every class, got none of {classes[min(missing)]}")
    kept = labels >= 0
    return RawData(data.pixels[kept], labels[kept]), ids[kept]


def _image_set(raw: RawData, ids: Tensor) -> ImageSet:
    return ImageSet(to_float(raw.pixels), torch.from_numpy(raw.labels.copy()), ids)


def _resize(pixels: Pixels, size: int | None) -> Pixels:
    height, width = pixels.shape[1:3]
    if size is None and height != width:
        raise ValueError(f"expected square images or an image_size, got {height} x {width}")
    if size is None or (height, width) == (size, size):
        return pixels
    out = np.empty((len(pixels), size, size, pixels.shape[3]), np.uint8)
    for start in range(0, len(pixels), 1024):
        resized = interpolate(
            to_float(pixels[start : start + 1024]), (size, size), mode="bilinear", antialias=True
        )
        grid = quantize(resized).mul_(255).round_().byte()
        out[start : start + 1024] = grid.permute(0, 2, 3, 1).numpy()
    return out


def _fingerprint(*splits: RawData) -> str:
    digest = hashlib.sha256()
    for pixels, labels in splits:
        digest.update(repr(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        digest.update(np.ascontiguousarray(labels, dtype=np.int64).data)
    return digest.hexdigest()
