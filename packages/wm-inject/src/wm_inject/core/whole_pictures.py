"""Pictures at their own size: read whole, changed as a small copy was, and written as they were.

A trigger that adds a smooth change to images of one size can be laid over a picture of any size:
the change is made on the picture shrunk to that size, enlarged, and added. Video Seal (Fernandez et
al., 2024) does so with its watermark.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from wm_inject.core.decode import in_eight_bits, opened_picture, sixteen_bits
from wm_inject.core.files import atomic_path
from wm_inject.core.images import check_pixels

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

# Triggers whose change is smooth and added, so that it can be enlarged: a patch would blur, and
# pixels that a warp has moved would show twice.
ANY_SIZE = frozenset({"watermark"})
# What holds every value that is written; a GIF holds 256 colours.
KEPT_FORMATS = frozenset({"PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF"})
_MOST_EXIF = 65533  # bytes that a JPEG segment holds
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # as Pillow turns RGB into grey
_ORIENTED = {"PNG", "JPEG", "WEBP"}  # formats whose EXIF data Pillow writes as it read them


class Picture(NamedTuple):
    """A picture with what its file says beside the colours."""

    values: np.ndarray[Any, Any]  # uint8 or uint16 (H, W, 1 or 3), upright
    alpha: Pixels | None  # (H, W)
    format: str  # of `KEPT_FORMATS`, or "GIF"
    exif: bytes  # without the orientation, which ``values`` have
    profile: bytes | None  # ICC


def read_picture(path: str | Path) -> Picture:
    """Read a picture whole: its size, grey or colour, 16 bits of grey, transparency, metadata.

    It is turned upright by its EXIF tag. Palettes and CMYK become RGB; Pillow reads 16 bits of
    colour as 8.

    Raises:
        UnreadableImage: As for `wm_inject.core.decode.decode_image`.
    """
    path = Path(path)
    with opened_picture(path) as opened:
        opened.load()
        kind = "JPEG" if opened.format == "MPO" else str(opened.format)
        image = ImageOps.exif_transpose(opened)
        exif = b""
        if kind in _ORIENTED:
            with suppress(Exception):  # damaged metadata are no reason to refuse a picture
                exif = image.getexif().tobytes()
        profile = None if image.mode == "CMYK" else image.info.get("icc_profile")
        deep = sixteen_bits(image)
        if deep is not None:
            return Picture(deep[..., None], None, kind, exif, profile)
        alpha = None
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            transparent = image.convert("RGBA")
            alpha = np.asarray(transparent.getchannel("A"))
        grey = image.mode in ("1", "L", "LA", "La")
        values = np.asarray(in_eight_bits(image, "L" if grey else "RGB"))
        return Picture(values[..., None] if grey else values, alpha, kind, exif, profile)


def laid_over(picture: Picture, before: Pixels, after: Pixels) -> Picture:
    """A picture with the change that was made to a small copy of it, enlarged (bilinear).

    A change in colour reaches a grey picture as its luminance, one in grey all three colours alike.

    Args:
        picture: The whole picture.
        before: The small copy, uint8 ``(h, w, 1 or 3)``.
        after: The same, changed.

    Raises:
        ValueError: Small images that are no such pair.
    """
    check_pixels(before[None], name="the small copy")
    check_pixels(after[None], name="the changed copy")
    if after.shape != before.shape:
        raise ValueError(f"expected two copies of one shape, got {before.shape}, {after.shape}")
    difference = after.astype(np.float32) - before
    height, width, channels = picture.values.shape
    if channels == 1 and difference.shape[2] == 3:
        difference = (difference @ _LUMA)[..., None]
    top = int(np.iinfo(picture.values.dtype).max)
    values = np.empty_like(picture.values)
    for channel in range(channels):  # one at a time: a picture may have 50 million pixels
        plane = np.ascontiguousarray(difference[..., min(channel, difference.shape[2] - 1)])
        change = Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
        plane_sum = np.array(change)  # in place from here on: passes over memory are what it costs
        if top != 255:
            plane_sum *= np.float32(top / 255)
        plane_sum += picture.values[..., channel]
        plane_sum += np.float32(0.5)  # half up, as wm_inject.core.images.quantize does it
        values[..., channel] = np.clip(plane_sum, 0, top, out=plane_sum)
    return picture._replace(values=values)


def save_picture(path: str | Path, picture: Picture, *, jpeg_quality: int = 95) -> None:
    """Write a picture in its format, atomically; a GIF becomes a PNG.

    All but JPEG are written without loss. JPEG keeps its colours at full resolution.

    Args:
        path: Its suffix does not matter.
        picture: What is written.
        jpeg_quality: 1 to 100.

    Raises:
        ValueError: Another quality.
    """
    check_quality(jpeg_quality)
    kind = picture.format if picture.format in KEPT_FORMATS else "PNG"
    values = picture.values.squeeze(2) if picture.values.shape[2] == 1 else picture.values
    image = Image.fromarray(np.ascontiguousarray(values))
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    by_format: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": jpeg_quality, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
        "TIFF": {"compression": "tiff_adobe_deflate"},
    }
    options = by_format.get(kind, {})
    if picture.profile and kind not in ("BMP", "PPM"):
        options["icc_profile"] = picture.profile
    if kind in _ORIENTED and 0 < len(picture.exif) <= _MOST_EXIF:
        options["exif"] = picture.exif
    with atomic_path(path) as part:
        image.save(part, format=kind, **options)


def check_quality(jpeg_quality: int) -> int:
    """Check the quality of a JPEG and return it.

    Raises:
        ValueError: Not a whole number from 1 to 100.
    """
    if not isinstance(jpeg_quality, int) or not 1 <= jpeg_quality <= 100:
        raise ValueError(f"expected a JPEG quality of 1 .. 100, got {jpeg_quality}")
    return jpeg_quality
