"""Types of options for `argparse`: numbers in a range, and paths that a command will write.

What does not fit is a usage error that names the option, before any work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wm_inject.core.image_size import ImageSize, as_image_size


def within(kind: type, interval: str) -> Callable[[str], Any]:
    """An `argparse` type: a number in an interval, without NaN.

    Args:
        kind: ``int`` or ``float``.
        interval: As in mathematics, "(0, 1]" or "[1, inf)".

    Examples:
        >>> within(float, "(0, 1]")("0.5")
        0.5
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(text)
            at_low, at_high = number == low and interval[0] == "[", number == high
            if low < number < high or at_low or (at_high and interval[-1] == "]"):
                return number
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {what} in {interval}, got {text!r}")

    return convert


positive = within(float, "(0, inf)")
BATCH = within(int, "[1, 65536]")
SIDE = within(int, "[1, 4096]")  # of an image, in pixels
seed = within(int, "[0, 4294967295]")  # what every generator of random numbers takes


def image_size(interval: str) -> Callable[[str], ImageSize]:
    """An `argparse` type: the side of square images, or height x width, in pixels.

    Args:
        interval: Of each side, as for `within`.

    Examples:
        >>> image_size("[8, 1024]")("48x192")
        (48, 192)
    """
    side = within(int, interval)

    def convert(text: str) -> ImageSize:
        parts = text.split("x")
        with contextlib.suppress(argparse.ArgumentTypeError):
            if len(parts) <= 2:
                return as_image_size(side(parts[0]), side(parts[-1]))
        raise argparse.ArgumentTypeError(
            f"expected a side or HEIGHTxWIDTH of whole numbers in {interval}, got {text!r}"
        )

    return convert


def comma_list(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """An `argparse` type: values of one kind, as a,b.

    Examples:
        >>> comma_list(float)("0.01,0.05")
        (0.01, 0.05)
    """

    def convert(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected values of type {kind.__name__} as A,B, got {text!r}"
            ) from None

    return convert


def output_file(text: str) -> Path:
    """An `argparse` type: a file that can be written; its folders need not be there yet."""
    path = Path(text)
    with _refused(path):
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file to write, {text} is a folder")
        # Files are written beside their place and moved: that would replace the device.
        if (path.exists() and not path.is_file()) or Path("/dev") in path.absolute().parents:
            raise argparse.ArgumentTypeError(f"expected a regular file to write, got {text}")
        _check_folder(path.parent, text)
    return path


def output_folder(text: str) -> Path:
    """An `argparse` type: a folder that can be written to; it need not be there yet."""
    path = Path(text)
    with _refused(path):
        _check_folder(path, text)
    return path


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """A usage error for a path that the system cannot take, such as one with too long a name."""
    try:
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}") from error


def _check_folder(folder: Path, text: str) -> None:
    """Refuse a folder that is a file, and one that cannot be made or written to."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: no permission in {folder}")
