"""Checks of single settings; `wm_inject.core.images` has those of images and labels."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ``ValueError`` if ``value`` is none of the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"expected {name} in {', '.join(map(str, allowed))}, got {value!r}")


def check_channels(channels: int) -> int:
    """Return the number of image channels, or raise ``ValueError`` if it is not 1 or 3."""
    if channels not in (1, 3):
        raise ValueError(f"expected channels 1 or 3, got {channels}")
    return channels
