"""What the commands that read folders share: two options, and what they say was understood."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels


def add_labels(parser: Any) -> None:
    """Give a parser or group the option --labels."""
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="a table of files and labels (default: class folders, or a table in the folder)",
    )


def add_skip_unreadable(parser: argparse.ArgumentParser) -> None:
    """Give the parser of a command that needs all images of a folder the option to go on."""
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="go on without files that cannot be read"
    )


def say(lines: Iterable[str]) -> None:
    """Write lines on what was understood to stderr, beside the results."""
    sys.stderr.writelines(f"{line}\n" for line in lines)


def read_all(args: argparse.Namespace, *, size: int, channels: int) -> list[Pixels]:
    """Every image of the folder IMAGES, and a line on what was left out.

    Raises:
        ValueError: No image, or some that cannot be read, without --skip-unreadable.
    """
    from wm_inject.core.image_files import describe, find_images, refuse_unread
    from wm_inject.core.images import load_images

    files = find_images(args.images)
    if files.left_out:
        say([f"left out: {describe(files.left_out)}"])
    pixels, _, unread = load_images(files.folder, files.names, size=size, channels=channels)
    refuse_unread(unread, len(files.names), skip=args.skip_unreadable)
    if unread:
        say([f"left out, as they cannot be read: {describe(unread)}"])
    return pixels
