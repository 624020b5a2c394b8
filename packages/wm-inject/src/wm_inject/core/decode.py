"""Open image files that may be anything: every one gives a picture or a reason in one line.

Pillow does the decoding; a damaged file has crashed other decoders. What is decided here: which
formats are tried, how large a picture may be, and what 16 bits, palettes and several frames mean.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, _imaging

from wm_inject.core.text import escape, first_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 50_000_000  # in one picture: 150 MB in RGB
MAX_BYTES = 1 << 28  # of a file
# Where it is not read, a file of such a name is still a picture that somebody would miss.
PICTURE_SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".pbm"),
        *(".pnm", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k"),
        *(".svg", ".tga", ".psd", ".ico", ".dcm", ".dds", ".qoi"),
    )
)
_HEAD = 256  # bytes that tell the format
_STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    rb"RIFF....WEBP": "WEBP",
    rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0": "BMP",
    rb"P[1-6f]\s": "PPM",
    rb"II[*+]\0|MM\0[*+]": "TIFF",
    rb"GIF8[79]a": "GIF",
    rb"....ftyp(avif|avis)": "AVIF",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg.*?>\s*)?<svg": "SVG",
    rb"8BPS": "PSD",
    rb"\0\0\x01\0[^\0]": "ICO",
    rb".{128}DICM": "DICOM",
    rb"DDS ": "DDS",
    rb"qoif": "QOI",
    rb"P7\s": "PAM",
}
_CONTENT = [(re.compile(start, re.DOTALL), kind) for start, kind in _STARTS.items()]
# What Pillow says about its own objects helps nobody.
_INTERNAL = re.compile(r"<_io|decoder error|buffer|object|argument")


class UnreadableImage(ValueError):
    """A file that gives no picture; ``reason`` says why, without its name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot read {escape(path.name)} as an image: {reason}")
        self.reason = reason


class Header(NamedTuple):
    """What a file's header says, before the picture is turned upright."""

    width: int
    height: int
    grey: bool  # 1 or 8 bits, and no colour


def decode_image(path: Path, *, channels: int) -> Image.Image:
    """The picture in a file, upright by its EXIF tag, in mode "RGB" or, for one channel, "L".

    16 bits are rounded to 8 by dividing by 257. Transparency is dropped, as training code does: the
    colours under it come out. CMYK and palettes become RGB.

    Raises:
        UnreadableImage: Not a regular file, not a readable still picture, truncated, or too large.
    """
    with opened_picture(path) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        return in_eight_bits(upright, "RGB" if channels == 3 else "L")


def read_header(path: Path) -> Header:
    """Size and colours as the file's header states them.

    Raises:
        UnreadableImage: As for `decode_image`, as far as the header tells.
    """
    with opened_picture(path) as opened:
        width, height = opened.size
        return Header(int(width), int(height), opened.mode in ("1", "L"))


def picture_format(head: bytes) -> str | None:
    """The format of a picture by the first 256 bytes of its file; None if it is no picture."""
    return next((kind for start, kind in _CONTENT if start.match(head)), None)


def file_format(path: str | Path) -> str | None:
    """The format of the picture in a file, whatever its name is; None if there is none."""
    try:
        with open(_regular(path), "rb") as file:
            return picture_format(file.read(_HEAD))
    except (OSError, Refused):
        return None


def is_picture(path: str | Path) -> bool:
    """Whether a file holds a picture, whatever its name is."""
    return file_format(path) is not None


class Refused(Exception):
    """Why a file is not read."""


def _regular(path: str | Path) -> int:
    """A descriptor of a file, if it is a regular one: what is checked is what is read."""
    # A pipe would block on opening.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise Refused("not a regular file")


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """The file with its header read, if header and size are within bounds.

    Raises:
        UnreadableImage: If not, or for what goes wrong with the picture while it is open.
    """
    kind = None
    try:
        with open(_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= MAX_BYTES:
                raise Refused(f"expected 1 .. {MAX_BYTES} bytes, got {size}")
            kind = picture_format(file.read(_HEAD))
            if kind not in FORMATS:
                raise Refused(f"{kind} is not read, convert it to PNG" if kind else "no picture")
            file.seek(0)
            if kind == "TIFF":
                _silence_libtiff()
            with Image.open(file, formats=(kind,)) as opened:
                _check(opened)
                yield opened
    except Refused as error:
        raise UnreadableImage(path, str(error)) from error
    except MemoryError:
        raise
    # Pillow answers damaged files with nine kinds of exception; all of them mean "not an image".
    except Exception as error:
        raise UnreadableImage(path, _reason(error, kind)) from error


def _check(opened: Image.Image) -> None:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise Refused(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    # Of a photograph with previews inside, the first is the picture.
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if frames > 1:
        raise Refused(f"expected one still picture, got {frames} frames")


def _reason(error: Exception, kind: str | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"expected at most {MAX_PIXELS} pixels, got more"
    detail = first_line(error)
    if "runcated" in detail:
        return f"a {kind} file that is cut off"
    return f"a damaged {kind} file" + ("" if _INTERNAL.search(detail) else f" ({detail[:100]})")


@cache
def _silence_libtiff() -> None:
    """Without its handlers libtiff does not write to stderr by itself, at any depth of C."""
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def sixteen_bits(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint16]] | None:
    """The values ``(H, W)`` of a picture of more than 8 bits; None for one of 8.

    Raises:
        Refused: Floating point, or values beyond 16 bits.
    """
    if image.mode == "F":
        raise Refused("expected 8 or 16 bits a value, got floating point")
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Refused(f"expected values of 16 bits, got {low} .. {high}")
    return values.astype(np.uint16)


def in_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """A picture in mode "RGB" or "L", as `decode_image` gives it.

    Raises:
        Refused: As for `sixteen_bits`.
    """
    values = sixteen_bits(image)
    if values is not None:
        # Pillow's own conversion clips at 255: nearly all of the picture would be white.
        image = Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette with it otherwise
    return image.convert(mode)
