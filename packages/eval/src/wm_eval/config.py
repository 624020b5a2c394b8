"""What a study is made of: one frozen dataclass a stage, and the TOML file that fills them in.

The settings of a stage are the settings of the package that does the work (`JointConfig`,
`TrainConfig`, `NCConfig`, ...), so a study has no vocabulary of its own to learn.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: No such file, or not TOML.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"expected a study in TOML at {path}, found none") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not TOML: {error}") from error


def fill(default: T, given: Mapping[str, Any], where: str = "study") -> T:
    """A copy of a settings object with some of its fields replaced, tables inside included.

    A table may name a preset of its own class (``preset = "paper"``) to start from instead.

    Args:
        default: A frozen dataclass.
        given: Field names to values, as TOML reads them.
        where: What to call the table in messages.

    Raises:
        ValueError: A key that is no field, a value of another type, or one that the class refuses.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"expected a table for {where}, got {given!r}")
    given = dict(given)
    preset = getattr(type(default), "preset", None)
    if "preset" in given and preset is not None:
        default = preset(given.pop("preset"))
    names = {f.name for f in fields(default) if f.init}  # type: ignore[arg-type]
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r} in {where}: expected one of {', '.join(sorted(names))}"
        )
    hints = typing.get_type_hints(type(default))
    changes = {}
    for name, value in given.items():
        old = getattr(default, name)
        here = f"{where}.{name}"
        nested = is_dataclass(old) and not isinstance(old, type)
        changes[name] = fill(old, value, here) if nested else _coerce(value, hints[name], here)
    try:
        return replace(default, **changes)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def plain(config: Any) -> dict[str, Any]:
    """A settings object as JSON knows it: what a record keeps of it."""
    return {name: _listed(value) for name, value in asdict(config).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _listed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """The value as its field wants it: whole numbers become floats, lists become tuples."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in choices:
            try:
                return _coerce(value, choice, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in choices:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = choices if Ellipsis not in choices else (choices[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(_coerce(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is Any or (hint in (bool, str) and isinstance(value, hint)):
        return value
    wanted = getattr(hint, "__name__", None) if origin is None else None
    raise ValueError(f"expected {wanted or hint} for {where}, got {value!r}")
