"""The size of images: one side where they are square, height and width where they are not.

An image size is an int for square images and a tuple ``(height, width)`` for all others, in pixels;
in JSON the tuple is a list.
"""

from __future__ import annotations

from typing import Any

ImageSize = int | tuple[int, int]


def as_image_size(height: int, width: int) -> ImageSize:
    """The size of images of so many pixels: a side where the two are equal."""
    return height if height == width else (height, width)


def height_width(size: ImageSize) -> tuple[int, int]:
    """Height and width of an image size, in pixels.

    Raises:
        ValueError: Neither a whole number of at least 1 nor a tuple of two.
    """
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"expected an image size as a side or (height, width), got {size!r}")
    return sides


def describe_size(size: ImageSize) -> str:
    """An image size for people: "224" or "48 x 192", the height first."""
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def size_to_json(size: ImageSize) -> int | list[int]:
    """An image size as JSON has it."""
    return list(size) if isinstance(size, tuple) else size


def size_from_json(value: object, *, least: int = 1, most: int = 4096) -> ImageSize:
    """The image size that JSON of unknown origin holds.

    Args:
        value: What `size_to_json` gave, or anything else.
        least: The shortest side to accept, in pixels.
        most: And the longest.

    Raises:
        ValueError: Neither a whole number in that range nor a list of two.
    """
    sides: list[Any] = value if type(value) is list else [value, value]
    if len(sides) != 2 or not all(type(side) is int and least <= side <= most for side in sides):
        raise ValueError(
            f"expected an image size of {least} .. {most} pixels, as a side or a height and a "
            "width, got something else"
        )
    return as_image_size(sides[0], sides[1])
