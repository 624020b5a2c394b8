"""Attacks by name, one file an attack. To add one: its file, and its name in ``_NAMES``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from wm_inject.attacks.definition import (
    PROFILES,
    Attack,
    FitContext,
    Fitted,
    Length,
    Needs,
    Profile,
    source_of,
)
from wm_inject.core.checks import check_choice

# In the order of tables. Each is the file of that name, with - as _.
_NAMES = (
    "badnets",
    "blend",
    "refool",
    "blindnet",
    "ssba",
    "sig",
    "ftrojan",
    "lf",
    "wanet",
    "marksman",
    "input-aware",
    "bpp",
)
# The kinds of triggers: that of the watermark is trained with its extractor, by wm-extract.
TRIGGER_KINDS = (*_NAMES, "watermark")


class _Table(Mapping[str, Attack]):
    """`TRIGGER_KINDS` to attacks; a file is imported when its attack is looked up."""

    def __getitem__(self, name: str) -> Attack:
        if name not in TRIGGER_KINDS:
            raise KeyError(name)
        found: Attack = import_module(f"{__name__}.{name.replace('-', '_')}").ATTACK
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(TRIGGER_KINDS)

    def __len__(self) -> int:
        return len(TRIGGER_KINDS)


ATTACKS: Mapping[str, Attack] = _Table()


def list_attacks() -> tuple[str, ...]:
    """The names of the attacks, in the order of tables; imports neither torch nor their files."""
    return _NAMES


def attack(name: str, *, profile: Profile = "small", **settings: Any) -> Attack:
    """An attack by name, with settings of its trigger or of its fit.

    Raises:
        ValueError: Another name or profile.
    """
    check_choice("an attack", name, _NAMES)
    return replace(ATTACKS[name], profile=profile, settings=settings)


__all__ = [
    "ATTACKS",
    "PROFILES",
    "TRIGGER_KINDS",
    "Attack",
    "FitContext",
    "Fitted",
    "Length",
    "Needs",
    "Profile",
    "attack",
    "list_attacks",
    "source_of",
]
