"""What the commands that measure share: lists as options, where settings start, the seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


def listed(text: str) -> tuple[str, ...]:
    """An option's list, as a,b.

    Examples:
        >>> listed("nc, reverse")
        ('nc', 'reverse')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[float, ...]:
    """An option's list of numbers, as 0.01,0.05.

    Raises:
        argparse.ArgumentTypeError: Something else than numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 0.5,0.5, got {text!r}") from None


def named_in(file: Mapping[str, Any], *keys: str) -> str | None:
    """The string that a file has at the end of these keys; None if there is none.

    Examples:
        >>> named_in({"data": {"name": "mnist"}}, "data", "name")
        'mnist'
    """
    found: Any = file
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None


def asked_seeds(args: argparse.Namespace, usual: tuple[int, ...]) -> tuple[int, ...]:
    """As many seeds as --seeds says, from --seed on; the usual ones, for what is not given."""
    if args.seeds is None and args.seed is None:
        return usual
    first = usual[0] if args.seed is None else args.seed
    return tuple(range(first, first + (len(usual) if args.seeds is None else args.seeds)))


__all__ = ["asked_seeds", "listed", "named_in", "numbers"]
