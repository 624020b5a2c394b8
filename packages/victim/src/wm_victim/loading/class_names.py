"""Names of classes as model files store them: lists, tables and texts of several habits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_KEYS = ("class_names", "classes", "names", "labels", "id2label", "idx_to_class", "class_to_idx")
_LONGEST = 200  # characters of a name
_NUMBERED = re.compile(r"""(\d{1,6})\s*:\s*(?:'([^'\n]*)'|"([^"\n]*)")""")
_QUOTED = re.compile(r"""'([^'\n]*)'|"([^"\n]*)\"""")


def stored_names(entries: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """The class names among a file's entries, by the keys that exporters and trainers use."""
    for key in _KEYS:
        if key in entries and (names := read_names(entries[key])) is not None:
            return names
    return None


def read_names(value: object) -> tuple[str, ...] | None:
    """Class names in the order of their numbers, or None for what is no list of names.

    Args:
        value: A list of names; a table from numbers to names or from names to numbers; or text with
            one of these as JSON or as Python prints it, or with commas or lines between the names.
    """
    if isinstance(value, str):
        value = _parsed(value[: 2**20])
    if isinstance(value, Mapping):
        value = _in_order(value)
    if not isinstance(value, (list, tuple)):
        return None
    names = tuple(value)
    plain = all(isinstance(n, str) and n.isprintable() and 0 < len(n) <= _LONGEST for n in names)
    return names if plain and 2 <= len(set(names)) == len(names) else None


def _parsed(text: str) -> object:
    text = text.strip()
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pairs = [(number, one or two) for number, one, two in _NUMBERED.findall(text)]
            return dict(pairs) if pairs else [one or two for one, two in _QUOTED.findall(text)]
    parts = text.splitlines() if "\n" in text else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def _in_order(table: Mapping[Any, Any]) -> list[Any] | None:
    """The names of a table, in the order of its numbers, which must be 0, 1, 2 and so on."""
    pairs = list(table.items())
    if all(isinstance(value, int) for _, value in pairs):
        pairs = [(number, name) for name, number in pairs]
    try:
        numbered = {int(number): name for number, name in pairs}
    except (TypeError, ValueError):
        return None
    in_order = sorted(numbered) == list(range(len(pairs)))
    return [numbered[number] for number in range(len(pairs))] if in_order else None
