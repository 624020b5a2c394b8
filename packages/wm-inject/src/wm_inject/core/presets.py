"""Named settings of frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from wm_inject.core.checks import check_choice

T = TypeVar("T")


def preset_of(
    cls: type[T], presets: Mapping[str, Mapping[str, Any]], name: str, /, **changes: Any
) -> T:
    """Build ``cls`` from the fields that ``presets`` has under ``name``, with changes.

    Raises:
        ValueError: No such preset, no such field, or a value outside its range.
    """
    check_choice("a preset", name, presets)
    unknown = sorted(changes.keys() - {field.name for field in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"expected settings of {cls.__name__}, got {', '.join(unknown)}")
    return cls(**{**presets[name], **changes})
