"""Data sets in one file: an .npz of arrays, or a .tar of lossless image strips."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wm_inject.core.images import check_pixels
from wm_victim.raw import LEAKED_CLASS, LEAKED_TRACK, RawData, RawDataset


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
    splits = [_npz_split(arrays, split) for split in ("train", "test")]
    count = 1 + max(int(split.labels.max()) for split in splits)
    classes = tuple(str(c) for c in arrays["classes"]) if "classes" in arrays else ()
    return RawDataset(
        name,
        splits[0],
        splits[1],
        classes or tuple(str(c) for c in range(count)),
        np.arange(len(splits[0].labels)),
    )


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


def read_strips(path: Path, name: str, *, strict: bool) -> RawDataset:
    """Read a tar of lossless WebP strips of tiles, one below the other, with meta.json and labels.

    Raises:
        ValueError: Not such a file.
    """
    try:
        with tarfile.open(path) as archive:
            # Only regular members have bytes to give.
            files = {
                member.name: member_file.read()
                for member in archive.getmembers()
                if (member_file := archive.extractfile(member)) is not None
            }
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
            labels = np.load(io.BytesIO(files[f"{split}_labels.npy"]), allow_pickle=False)
            splits.append(RawData(pixels, labels.astype(np.int64)))
        classes = tuple(str(c) for c in meta["classes"])
        keep = np.ones(len(splits[0].labels), dtype=bool)
        if name == "gtsrb" and strict:
            frames = np.load(io.BytesIO(files["train_track_frame.npy"]), allow_pickle=False)
            keep = ~((splits[0].labels == LEAKED_CLASS) & (frames[:, 0] == LEAKED_TRACK))
    except Exception as error:
        raise ValueError(f"cannot read {path.name} as image strips: {error}") from error
    train = RawData(splits[0].pixels[keep], splits[0].labels[keep])
    return RawDataset(name, train, splits[1], classes, np.flatnonzero(keep))
