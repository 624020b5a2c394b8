"""The clean images that an audit looks with: some of a folder's, each read right or named."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wm_eval.audit.settings import MIN_IMAGES
from wm_inject import load_image, to_float
from wm_inject.core.decode import UnreadableImage
from wm_inject.core.image_files import LeftOut, describe
from wm_inject.core.image_size import ImageSize, as_image_size, height_width
from wm_inject.core.labelled_folder import LabelledFolder, listed, read_labelled_folder
from wm_inject.core.text import escape

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

_LOOKED_AT = 20  # pictures, for the size of all


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Clean images of a folder, and what is known of them.

    Args:
        labels: int64 ``(N,)``; None if nobody knows them.
        files: Their names below the folder.
        skipped: Files that could not be read, each with the reason.
        classes: The name of every label; None if they have only numbers, or nobody knows them.
        source: What was understood of the folder.
    """

    images: Tensor
    labels: Tensor | None
    files: tuple[str, ...]
    skipped: tuple[LeftOut, ...]
    classes: tuple[str, ...] | None = None
    source: LabelledFolder | None = None

    def lines(self) -> list[str]:
        """What was understood, left out and not read, for people."""
        unread = [f"cannot read: {describe(self.skipped)}"] if self.skipped else []
        return [*(self.source.lines() if self.source else ()), *unread]

    def facts(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        source = self.source.to_dict() if self.source else None
        return {"used": len(self.files), "skipped": listed(self.skipped), "source": source}


def read_clean(
    folder: str | Path,
    *,
    size: ImageSize,
    channels: int,
    count: int = 500,
    labels: str | Path | None = None,
    seed: int = 0,
) -> CleanImages:
    """Read up to ``count`` images of a folder, drawn by the seed, in the order of their names.

    Args:
        folder: What `read_labelled_folder` takes. Of a part for testing, or else for validation,
            that has ``count`` images, only that part is used; else all of them.
        size: Side that they are resized to, or height and width.
        channels: 1 or 3.
        count: At most so many.
        labels: A table of files and labels; the folder's own ones if None.

    Raises:
        ValueError: No such folder, too few readable images, or labels that cannot be understood.
    """
    if count < MIN_IMAGES:
        raise ValueError(f"expected a count of at least {MIN_IMAGES} images, got {count}")
    source = _held_out(read_labelled_folder(folder, labels=labels), count)
    pixels: list[Pixels] = []
    kept: list[int] = []
    skipped: list[LeftOut] = []
    for place in np.random.default_rng(seed).permutation(len(source.names)):
        if len(pixels) == count:
            break
        name = source.names[place]
        try:
            pixels.append(load_image(source.folder / name, size=size, channels=channels))
            kept.append(int(place))
        except UnreadableImage as error:
            skipped.append(LeftOut(name, error.reason))
    if len(kept) < MIN_IMAGES:
        unread = f"; cannot read {describe(sorted(skipped))}" if skipped else ""
        raise ValueError(
            f"expected at least {MIN_IMAGES} readable images in {escape(folder)}, found "
            f"{len(kept)}{unread}; {'; '.join(source.lines())}"
        )
    order = np.argsort(kept)
    places = [kept[place] for place in order]
    return CleanImages(
        to_float(np.stack([pixels[place] for place in order])),
        None if source.labels is None else torch.from_numpy(source.labels[places]),
        tuple(source.names[place] for place in places),
        tuple(sorted(skipped)),
        None if source.labels is None else source.class_names,
        source,
    )


def common_size(folder: str | Path, *, labels: str | Path | None = None) -> ImageSize | None:
    """The size of the pictures of a folder, if those that are looked at share one of 8 .. 1024.

    Args:
        folder: As for `read_clean`, and so is ``labels``.

    Raises:
        ValueError: No such folder, or labels that cannot be understood.
    """
    source = read_labelled_folder(folder, labels=labels)
    sizes: set[ImageSize] = set()
    for name in source.names[:: max(1, len(source.names) // _LOOKED_AT)]:
        with suppress(UnreadableImage):
            height, width = load_image(source.folder / name).shape[:2]
            sizes.add(as_image_size(height, width))
    if len(sizes) != 1:
        return None
    (size,) = sizes
    return size if all(8 <= side <= 1024 for side in height_width(size)) else None


def _held_out(source: LabelledFolder, count: int) -> LabelledFolder:
    """The part for testing or validation, if it is large enough."""
    for part in ("test", "val"):
        places = [place for place, name in enumerate(source.parts) if name == part]
        if count <= len(places) < len(source.names):
            return replace(source.subset(places), layout=f"{source.layout}, {part} alone")
    return source
