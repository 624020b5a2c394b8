"""Settings as frozen dataclasses: filled from TOML, and written as TOML.

TOML has no null: where a field may be None, ``"none"`` stands for it.
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
    """Read a TOML file; ``what`` names its content in messages.

    Raises:
        ValueError: No such file, or not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected {what} in TOML at {path}, found none") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not TOML: {error}") from error


def fill(default: T, table: Mapping[str, Any], where: str = "settings") -> T:
    """A copy of a settings object with some fields replaced, tables inside included.

    ``preset = "paper"`` in a table starts from that preset of its class, where the class has
    presets and no field of that name. A seed at the top takes the place of those in tables.

    Args:
        default: A frozen dataclass.
        table: Field names to values, as TOML reads them.
        where: The table's name in messages.

    Raises:
        ValueError: A key that is no field, a value of another type, one that the class refuses, or
            a second seed.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"expected a table for {where}, got {table!r}")
    values = dict(table)
    kind: Any = type(default)
    names = sorted(field.name for field in fields(default) if field.init)  # type: ignore[arg-type]
    if "preset" in values and "preset" not in names and hasattr(kind, "preset"):
        default = kind.preset(values.pop("preset"))
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"unknown key {name!r} in {where}: expected one of {', '.join(names)}")
        inner = is_dataclass(getattr(default, name)) and isinstance(value, Mapping)
        if inner and "seed" in names and "seed" in value:
            raise ValueError(f"expected one seed at the top of {where}, got one in {where}.{name}")
    hints = typing.get_type_hints(kind)
    changes = {
        name: _read(getattr(default, name), value, hints[name], f"{where}.{name}")
        for name, value in values.items()
    }
    try:
        return replace(default, **changes)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def to_toml(config: Any) -> str:
    """A settings object as TOML that `fill` turns into the same settings, whatever it starts from.

    Every field is written but the seed of a table whose settings have a seed, or seeds, at the top.

    Raises:
        ImportError: tomli-w is not installed; the extra ``torch`` brings it.
        ValueError: Settings that TOML cannot hold.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError("writing TOML needs tomli-w: pip install tomli-w") from error

    text = tomli_w.dumps(_write(config))
    if fill(config, tomllib.loads(text)) != config:
        raise ValueError(f"expected settings that TOML can hold, got {config}")
    return text


def _write(value: Any, *, seeded: bool = False) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.init and not (seeded and f.name == "seed")]
        seeded = seeded or not {"seed", "seeds"}.isdisjoint(names)
        return {name: _write(getattr(value, name), seeded=seeded) for name in names}
    if isinstance(value, Mapping):
        return {str(name): _write(item, seeded=seeded) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_write(item, seeded=seeded) for item in value]
    if value is None:
        return UNSET
    return value if isinstance(value, bool | int | float) else str(value)


def _read(old: Any, value: Any, hint: Any, where: str) -> Any:
    """The value of a field: a table is filled over what is there, anything else replaces it."""
    if is_dataclass(old) and not isinstance(old, type):
        return fill(old, value, where)
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a table for {where}, got {value!r}")
        inner = typing.get_args(hint)[1]
        olds = old if isinstance(old, Mapping) else {}
        return {key: _read(olds.get(key), v, inner, f"{where}.{key}") for key, v in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return fill(_default(hint, where), value, where)
    return _convert(value, hint, where)


def _default(kind: type[Any], where: str) -> Any:
    """A dataclass with its defaults; fields without one that are dataclasses likewise."""
    hints = typing.get_type_hints(kind)
    required = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for field in required:
        if not is_dataclass(hints[field.name]):
            raise ValueError(f"expected {where}.{field.name}, which has no default")
    return kind(**{f.name: _default(hints[f.name], f"{where}.{f.name}") for f in required})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as a type hint asks: whole numbers become floats, lists tuples, "none" None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value == UNSET and types.NoneType in arguments:
            return None
        for argument in arguments:
            try:
                return _convert(value, argument, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = arguments if Ellipsis not in arguments else (arguments[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(_convert(v, kind, where) for v, kind in zip(value, kinds, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (hint in (bool, int, str) and type(value) is hint):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else None
    raise ValueError(f"expected {expected or hint} for {where}, got {value!r}")
