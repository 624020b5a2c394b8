"""Settings of a command: a frozen dataclass, options for its fields, and a TOML file.

Its tables are the settings of the library that does the work. Three layers make up the settings,
each over the one before: the defaults or a preset, the file of --config, the options.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wm_inject.command.common import Parser
from wm_inject.command.values import comma_list
from wm_inject.core.toml_settings import fill, load_toml, to_toml

T = TypeVar("T")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Give a parser --config and --print-config; a --seed not given is then that of the file."""
    group = parser.add_argument_group("settings as a file")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="settings in TOML, as --print-config writes them; options win over the file",
    )
    add_print_config(group)
    parser.set_defaults(seed=None, parser=parser)


def add_print_config(parser: Any) -> None:
    """Give a parser or group --print-config alone."""
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML, and do nothing"
    )


def add_options(parser: Any, settings: type, helps: Mapping[str, str], *, table: str = "") -> None:
    """Give a parser or group an option for each of some fields of a settings class.

    The field says the type, the choices (of a ``Literal``) and the default that the help shows.

    Args:
        parser: A parser or group.
        settings: A dataclass.
        helps: Field names to help texts.
        table: The field of the command's settings that holds this dataclass; "" for themselves.
    """
    hints = typing.get_type_hints(settings)
    defaults = {field.name: field.default for field in fields(settings)}
    for name, text in helps.items():
        shown = table or defaults[name] in (None, False, MISSING) or "(default" in text
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"{table}.{name}" if table else name,
            help=text if shown else f"{text} (default: {defaults[name]})".replace("%", "%%"),
            **_argument(hints[name]),
        )


def _argument(hint: Any) -> dict[str, Any]:
    """What `argparse` takes for values of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _argument(hint)
    if origin is typing.Literal:
        return {"choices": arguments}
    if origin is tuple:
        return {"type": comma_list(arguments[0]), "metavar": "A,B"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}


def add_preset(parser: Any, option: str, *, table: str, choices: Sequence[str], help: str) -> None:
    """Give a parser or group the option that names the preset of a table of its settings."""
    parser.add_argument(option, dest=f"{table}.preset", choices=tuple(choices), help=help)


def read_settings(args: argparse.Namespace, start: T) -> T:
    """Settings from their three layers.

    Args:
        args: With the options of `add_config`, `add_options` and `add_preset`; None is "not given".
        start: The defaults, a frozen dataclass.

    Raises:
        ValueError: A file that does not fit.
        SystemExit: A usage error: an option that does not fit, or a preset and its table.
    """
    config = getattr(args, "config", None)
    file = {} if config is None else load_toml(config)
    for field in fields(start):  # type: ignore[arg-type]
        preset = getattr(args, f"{field.name}.preset", None)
        if preset is None:
            continue
        if field.name in file:
            args.parser.error(
                f"{_option(args, f'{field.name}.preset')} and {field.name!r} in {config} "
                "both say where to start: give one of them"
            )
        table = type(getattr(start, field.name)).preset(preset)
        start = replace(start, **{field.name: table})  # type: ignore[type-var]
    try:
        start = fill(start, file)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    return _apply(args, start)


def _apply(args: argparse.Namespace, settings: T, table: str = "") -> T:
    """The options that were given over the settings."""
    changes: dict[str, Any] = {}
    options: dict[str, str] = {}
    for field in fields(settings):  # type: ignore[arg-type]
        dest, old = table + field.name, getattr(settings, field.name)
        if is_dataclass(old):
            changes[field.name] = _apply(args, old, f"{dest}.")
        elif getattr(args, dest, None) is not None:
            changes[field.name] = getattr(args, dest)
            options[field.name] = _option(args, dest)
    try:
        return replace(settings, **changes)  # type: ignore[type-var]
    except ValueError as error:
        message = f"{', '.join(options.values())}: {error}"
    for name, option in options.items():
        try:
            replace(settings, **{name: changes[name]})  # type: ignore[type-var]
        except ValueError as error:
            message = f"argument {option}: {error}"
            break
    parser: Parser = args.parser
    parser.error(message)


def _option(args: argparse.Namespace, dest: str) -> str:
    return next(str(a.option_strings[0]) for a in args.parser._actions if a.dest == dest)


def print_config(settings: Any) -> int:
    """Print settings as TOML; the exit code is 0.

    Raises:
        ValueError: Settings that TOML cannot hold.
    """
    sys.stdout.write(to_toml(settings))
    return 0
