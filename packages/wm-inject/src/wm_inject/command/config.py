"""The options --config and --print-config: the settings of a command as a TOML file.

A command that has them describes its settings as a frozen dataclass, whose tables are the settings
of the library that does the work. Three layers make them up: where they start (a preset), what the
file says, and what the options say, each over the one before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wm_inject.core.config import fill, load_toml, one_seed, to_toml

T = TypeVar("T")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Give a parser --config and --print-config, and no value to options that are not given.

    Args:
        parser: The parser of one command, with its other options.
    """
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
    """Give a parser or group --print-config alone: for commands that read their file otherwise."""
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML, and do nothing"
    )


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """What the file of --config says, or nothing.

    Raises:
        ValueError: No such file, or not TOML.
    """
    return {} if args.config is None else load_toml(args.config)


def layered(args: argparse.Namespace, start: T, file: Mapping[str, Any], given: Any) -> T:
    """Settings from three layers: the start, what the file says, what the options say.

    Args:
        args: With ``config``, for messages.
        start: A frozen dataclass.
        file: What `read_config` found.
        given: The values of options by field name, tables inside included; None is "not given".

    Raises:
        ValueError: An unknown key, a value of another type or outside its range, or a seed inside
            a table of settings that have one themselves.
    """
    try:
        one_seed(start, file)
        start = fill(start, file)
    except ValueError as error:
        raise ValueError(f"{args.config}: {error}") from error
    return _over(start, given)


def refuse_preset(args: argparse.Namespace, option: str, key: str, file: Mapping[str, Any]) -> None:
    """Leave with a usage error if a preset is asked for by an option and its table by a file.

    A preset sets all of its table, so that one of both would be lost without a word.

    Args:
        args: With ``parser`` and the value of the option, None if it was not given.
        option: The option's name without dashes.
        key: What it sets: the table, or the key, of the file.
        file: What `read_config` found.
    """
    if getattr(args, option.replace("-", "_")) is not None and key in file:
        args.parser.error(
            f"--{option} and {key!r} in {args.config} both say where to start: give one of them"
        )


def take_over(args: argparse.Namespace, settings: Any) -> None:
    """Put settings where the options were: the rest of a command reads them from ``args``."""
    for field in fields(settings):
        setattr(args, field.name, getattr(settings, field.name))


def print_config(settings: Any) -> int:
    """Print settings as TOML; the exit code is 0.

    Raises:
        ValueError: Settings that TOML cannot hold.
    """
    sys.stdout.write(to_toml(settings))
    return 0


def _over(start: Any, given: Mapping[str, Any]) -> Any:
    """The values that are given over those of a dataclass; refused as its fields refuse them."""
    changes = {}
    for name, value in given.items():
        old = getattr(start, name)
        if is_dataclass(old) and isinstance(value, Mapping):
            changes[name] = _over(old, value)
        elif value is not None:
            changes[name] = value
    return replace(start, **changes)


__all__ = [
    "add_config",
    "add_print_config",
    "layered",
    "print_config",
    "read_config",
    "refuse_preset",
    "take_over",
]
