"""Ten classes of ImageNet that are easily told apart, as Imagenette collects them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from wm_inject.core.images import list_images, load_image
from wm_victim.raw import Pixels, RawData, RawDataset

# The folders of the set and what is on the pictures, in the order of the labels.
CLASSES = {
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
SIDE = 224  # pixels, unless told otherwise


def read_imagenet10(root: Path, size: int | None, *, download: bool) -> RawDataset:
    """Read imagenet10.tar (JPEG files below train/ and val/), or torchvision's Imagenette.

    Every picture is squeezed to a square of ``size`` pixels (224 if None), whatever its aspect.

    Raises:
        ValueError: A damaged file, or a set that is not there and was not fetched.
    """
    size = SIDE if size is None else size
    path = root / "imagenet10.tar"
    train, test = (
        _read_tar(path, size) if path.is_file() else _read_torchvision(root, size, download)
    )
    return RawDataset(
        "imagenet10", train, test, tuple(CLASSES.values()), np.arange(len(train.labels))
    )


def _read_tar(path: Path, size: int) -> tuple[RawData, RawData]:
    try:
        with tarfile.open(path) as archive:
            files = {
                member.name: opened.read()
                for member in archive.getmembers()
                if (opened := archive.extractfile(member)) is not None
            }
        wnids = json.loads(files["meta.json"])["wnids"]
        if wnids != list(CLASSES):
            raise ValueError(f"expected the classes {', '.join(CLASSES)}")
        found = []
        for split in ("train", "val"):
            names = [name for name in sorted(files) if name.startswith(f"{split}/")]
            labels = np.array([wnids.index(name.split("/")[1]) for name in names], np.int64)
            found.append(RawData(np.stack([_decode(files[name], size) for name in names]), labels))
    # Pillow, tar and JSON each raise their own; all mean "not such a file".
    except Exception as error:
        raise ValueError(f"cannot read {path.name} as JPEG images: {error}") from error
    return found[0], found[1]


def _decode(content: bytes, size: int) -> Pixels:
    image = Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)


def _read_torchvision(root: Path, size: int, download: bool) -> tuple[RawData, RawData]:
    from torchvision.datasets import Imagenette

    folder = root / "imagenette2-320"
    try:
        Imagenette(str(root), size="320px", download=download and not folder.is_dir())
    # Missing files and no network: RuntimeError, URLError (an OSError) or EOFError.
    except (RuntimeError, OSError, EOFError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot get imagenet10 under {root}: {detail}") from error
    found = []
    for split in ("train", "val"):
        files = list_images(folder / split)
        labels = np.array([list(CLASSES).index(file.parent.name) for file in files], np.int64)
        found.append(RawData(np.stack([load_image(file, size=size) for file in files]), labels))
    return found[0], found[1]
