"""How a mark fares on photographs at their own size: how visible it is, and what it survives."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from wm_eval.intervals import exact_lower, exact_upper
from wm_eval.measure import stealth_values
from wm_eval.robustness import stream
from wm_extract import MarkDetector
from wm_inject import WatermarkTrigger, to_float, to_pixels
from wm_inject.core.whole_pictures import Picture, laid_over

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

    Change = Callable[[Image.Image, np.random.Generator], Image.Image]

_BATCH = 32


def jpeg(quality: int, subsampling: int = 2) -> Change:
    """Stored as JPEG; 2 halves the resolution of the colours, 0 keeps it."""

    def change(image: Image.Image, _: np.random.Generator) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=quality, subsampling=subsampling)
        return Image.open(stream).convert("RGB")

    return change


def scaled(low: float, high: float, filters: Sequence[Image.Resampling]) -> Change:
    """Resized by a factor in [low, high] with one of the filters."""

    def change(image: Image.Image, draw: np.random.Generator) -> Image.Image:
        factor = draw.uniform(low, high)
        size = (round(image.width * factor), round(image.height * factor))
        return image.resize(size, filters[int(draw.integers(len(filters)))])

    return change


def cropped(share: float) -> Change:
    """A window of this share of width and of height, anywhere."""

    def change(image: Image.Image, draw: np.random.Generator) -> Image.Image:
        width, height = round(image.width * share), round(image.height * share)
        left = int(draw.integers(image.width - width + 1))
        top = int(draw.integers(image.height - height + 1))
        return image.crop((left, top, left + width, top + height))

    return change


def screenshot(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Shown at another scale, a rim cut off, and stored as JPEG."""
    anywhere = scaled(0.5, 2.0, [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    return jpeg(85)(cropped(0.95)(anywhere(image, draw), draw), draw)


FILTERS = tuple(
    getattr(Image.Resampling, name) for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
)
CHANGES: Mapping[str, Change] = {
    "none": lambda image, _: image,
    "jpeg-95": jpeg(95, subsampling=0),
    "jpeg-75": jpeg(75),
    "jpeg-50": jpeg(50),
    "half size": scaled(0.5, 0.5, FILTERS),
    "double size": scaled(2.0, 2.0, FILTERS),
    "crop-90": cropped(0.9),
    "grey": lambda image, _: image.convert("L").convert("RGB"),
    "screenshot": screenshot,
}


def measure_photographs(
    trigger: WatermarkTrigger, detector: MarkDetector, photographs: Sequence[Pixels], seed: int
) -> dict[str, Any]:
    """Figures of a mark that is laid over whole photographs, each uint8 ``(H, W, 3)``, of one size.

    ``stealth`` is of the pixels, ``stealth_jpeg`` of files of quality 95, as ``wm-inject poison``
    writes JPEG.
    """
    side, n = trigger.injector.image_size, len(photographs)
    marked: list[Pixels] = []
    for part in _parts(photographs):
        small = np.stack([shrunk(image, side) for image in part])
        with torch.no_grad():
            after = to_pixels(trigger(to_float(small)))
        pairs = zip(part, small, after, strict=True)
        marked += [laid_over(Picture(i, None, "PNG", b"", None), b, a).values for i, b, a in pairs]
    rows = {}
    for name, change in CHANGES.items():
        hits = int(found(detector, marked, change, stream(seed, name)).sum())
        false = int(found(detector, photographs, change, stream(seed, name)).sum())
        rows[name] = {
            "true_positives": hits,
            "tpr_lower": exact_lower(hits, n),
            "false_positives": false,
            "fpr_upper": exact_upper(false, n),
        }
    draw = np.random.default_rng(seed)
    files = [np.asarray(CHANGES["jpeg-95"](Image.fromarray(i), draw)) for i in marked]
    originals = to_float(np.stack(photographs))
    return {
        "n": n,
        "size": list(photographs[0].shape[:2]),
        "stealth": stealth_values(to_float(np.stack(marked)), originals),
        "stealth_jpeg": stealth_values(to_float(np.stack(files)), originals),
        "corruptions": rows,
    }


def found(
    detector: MarkDetector, photographs: Sequence[Pixels], change: Change, seed: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which photographs the detector calls marked after a change."""
    draw = np.random.default_rng(seed)
    side = detector.watermark.shape[-1]
    answers = []
    for part in _parts(photographs):
        variants = [np.asarray(change(Image.fromarray(image), draw)) for image in part]
        small = to_float(np.stack([shrunk(image, side) for image in variants]))
        answers.append(detector.detect(small).marked.numpy())
    return np.concatenate(answers)


def shrunk(image: Pixels, side: int) -> Pixels:
    """As `wm_inject.load_image` resizes."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(small, np.uint8)


def _parts(photographs: Sequence[Pixels]) -> Iterator[Sequence[Pixels]]:
    for start in range(0, len(photographs), _BATCH):
        yield photographs[start : start + _BATCH]
