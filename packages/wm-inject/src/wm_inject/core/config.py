"""Settings as frozen dataclasses: filled from TOML, and written as TOML.

TOML has no null. A field that may be left unset (``float | None``) is written ``"none"`` where it
is, and read back so.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
UNSET = "none"


def load_toml(path: str | Path, *, what: str = "settings") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        what: What is in it, for the message.

    Raises:
        ValueError: No such file, or not TOML.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"expected {what} in TOML at {path}, found none") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not TOML: {error}") from error


def fill(default: T, given: Mapping[str, Any], where: str = "settings") -> T:
    """A copy of a settings object with some of its fields replaced, tables inside included.

    A table may name a preset of its own class (``preset = "paper"``) to start from instead, where
    the class has presets and no field of that name.

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
    names = {f.name for f in fields(default) if f.init}  # type: ignore[arg-type]
    preset = getattr(type(default), "preset", None)
    if "preset" in given and "preset" not in names and preset is not None:
        default = preset(given.pop("preset"))
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r} in {where}: expected one of {', '.join(sorted(names))}"
        )
    hints = typing.get_type_hints(type(default))
    changes = {
        name: _value(getattr(default, name), value, hints[name], f"{where}.{name}")
        for name, value in given.items()
    }
    try:
        return replace(default, **changes)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def one_seed(start: Any, given: Mapping[str, Any], where: str = "settings") -> None:
    """Refuse a seed inside a table of settings that have a seed themselves.

    Raises:
        ValueError: There is one: which of both should count?
    """
    if not any(f.name == "seed" for f in fields(start)):
        return
    for name, table in given.items():
        inside = isinstance(table, Mapping) and is_dataclass(getattr(start, name, None))
        if inside and "seed" in table:
            raise ValueError(f"expected one seed at the top of {where}, got one in {where}.{name}")


def to_toml(config: Any) -> str:
    """A settings object as TOML, complete: every field, whether it has its default or not.

    Left out is only the seed of a table inside settings that have a seed, or seeds, themselves:
    these take its place.

    Args:
        config: A frozen dataclass of numbers, strings, truth values, None, and tuples, mappings
            and dataclasses of these.

    Returns:
        What `fill` turns into the same settings again, whatever it starts from.

    Raises:
        ImportError: tomli-w is not installed; the extra ``torch`` brings it.
        ValueError: Settings that TOML cannot hold.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError("writing TOML needs tomli-w: pip install tomli-w") from error

    text = tomli_w.dumps(_table(config))
    if fill(config, tomllib.loads(text)) != config:
        raise ValueError(f"expected settings that TOML can hold, got {config}")
    return text


def _table(config: Any, *, seeded: bool = False) -> dict[str, Any]:
    names = [f.name for f in fields(config) if f.init and not (seeded and f.name == "seed")]
    seeded = seeded or not {"seed", "seeds"}.isdisjoint(names)
    return {name: _written(getattr(config, name), seeded) for name in names}


def _written(value: Any, seeded: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _table(value, seeded=seeded)
    if isinstance(value, Mapping):
        return {str(name): _written(item, seeded) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item, seeded) for item in value]
    if value is None:
        return UNSET
    return value if isinstance(value, bool | int | float) else str(value)


def _value(old: Any, value: Any, hint: Any, where: str) -> Any:
    """The value of a field: a table is filled over what is there, anything else takes its place."""
    if is_dataclass(old) and not isinstance(old, type):
        return fill(old, value, where)
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a table for {where}, got {value!r}")
        inner = typing.get_args(hint)[1]
        olds = old if isinstance(old, Mapping) else {}
        return {k: _value(olds.get(k), v, inner, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return fill(_bare(hint, where), value, where)
    return _coerce(value, hint, where)


def _bare(kind: type[Any], where: str) -> Any:
    """A dataclass as its defaults have it, the tables that it needs likewise."""
    hints = typing.get_type_hints(kind)
    needed = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for one in needed:
        if not is_dataclass(hints[one.name]):
            raise ValueError(f"expected {where}.{one.name}, which has no default")
    return kind(**{one.name: _bare(hints[one.name], f"{where}.{one.name}") for one in needed})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """The value as its field wants it: whole numbers become floats, lists become tuples."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value == UNSET and types.NoneType in choices:
            return None
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
    elif hint is Any or (hint in (bool, int, str) and type(value) is hint):
        return value
    wanted = getattr(hint, "__name__", None) if origin is None else None
    raise ValueError(f"expected {wanted or hint} for {where}, got {value!r}")


__all__ = ["UNSET", "fill", "load_toml", "one_seed", "to_toml"]
