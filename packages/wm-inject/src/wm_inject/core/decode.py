"""Open image files that may be anything: every one gives a picture or a reason in one line.

Pillow does the decoding; a damaged file has crashed other decoders. What is decided here: which
formats are tried, how large a picture may be, and what 16 bits, palettes and several frames mean.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
MAX_PIXELS = 50_000_000  # in one picture: 150 MB in RGB
MAX_BYTES = 1 << 28  # of a file


def decode_image(path: Path, *, channels: int) -> Image.Image:
    """The picture in a file, upright by its EXIF tag, in mode "RGB" or, for one channel, "L".

    16 bits are rounded to 8 by dividing by 257. Transparency is dropped, as training code does: the
    colours under it come out. CMYK and palettes become RGB.

    Raises:
        ValueError: Not a regular file, not a readable still picture, truncated, or too large.
    """
    try:
        with _opened(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _in_eight_bits(upright, "RGB" if channels == 3 else "L")
    # Pillow answers damaged files with nine kinds of exception; all of them mean "not an image".
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {path.name} as an image: {reason[:200]}") from error


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height as the file's header states them, before it is turned upright.

    Raises:
        ValueError: As for `decode_image`, as far as the header tells.
    """
    try:
        with _opened(path) as opened:
            width, height = opened.size
            return int(width), int(height)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {path.name} as an image: {reason[:200]}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file with its header read, if header and size are within bounds."""
    # A pipe would block on opening; what is checked is the file that is read, not its name.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if not 0 < status.st_size <= MAX_BYTES:
            raise ValueError(f"expected 1 .. {MAX_BYTES} bytes, got {status.st_size}")
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
            # Of a photograph with previews inside, the first is the picture.
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"expected one still picture, got {frames} frames")
            yield opened


def _in_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a value, got floating point")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"expected values of 16 bits, got {low} .. {high}")
        # Pillow's own conversion clips at 255: nearly all of the picture would be white.
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette with it otherwise
    return image.convert(mode)
