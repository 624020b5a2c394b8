"""One walk over every public name of the six packages: each refuses bad input in one clear line.

A public function or class without a case in the tables of `tools/tests/refusals` fails here, and so
does a case whose name is no longer public.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tools.check_graph import MODULES
from tools.tests.refusals import common, evaluation, extract, inject, nc, reverse, victim
from torch import Tensor, nn

TABLES = {t.TABLE.module: t.TABLE for t in (inject, extract, victim, nc, reverse, evaluation)}
TENSORS = re.compile(r"\b(Tensor|Pixels|ndarray|NDArray)\b")


def public(module: str) -> dict[str, Any]:
    """The public names of a package, dunder names left out."""
    package = importlib.import_module(module)
    names = getattr(package, "__all__", [])
    return {name: getattr(package, name) for name in names if not name.startswith("__")}


def takes_nothing(value: object) -> bool:
    """Protocols, enums, errors, result tuples and constants have nothing to refuse."""
    if not isinstance(value, type):
        return not inspect.isfunction(value)
    is_result = issubclass(value, tuple) and hasattr(value, "_fields")
    is_kind = issubclass(value, BaseException | enum.Enum)
    return is_result or is_kind or getattr(value, "_is_protocol", False)


def entry(value: Any) -> Callable[..., object] | None:
    """What takes the data: a function itself, or the call of a class."""
    if not isinstance(value, type):
        return value
    return value.__dict__.get("forward" if issubclass(value, nn.Module) else "__call__")


def takes_tensors(value: object) -> bool:
    """Whether a function, or the call of a class, has a required tensor argument."""
    called = entry(value)
    if called is None:
        return False
    parameters = inspect.signature(called).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    return any(TENSORS.search(str(p.annotation)) for p in required)


CASES = [
    pytest.param(cases, id=f"{module}.{name}")
    for module, table in sorted(TABLES.items())
    for name, cases in table.cases.items()
]


def missing(table: common.Table, name: str, value: object) -> str | None:
    """What the table of a package lacks for one public name; None if nothing."""
    if takes_nothing(value) or name in table.nothing:
        return None
    if name not in table.cases:
        return "no case"
    kinds = common.KINDS - set(table.cases[name])
    if takes_tensors(value) and name not in table.partly and kinds:
        return f"takes tensors, no case for {sorted(kinds)}"
    if hasattr(value, "preset") and not any(w.startswith("preset") for w in table.cases[name]):
        return "no case for its presets"
    return None


def test_every_public_name_has_a_refusal_case() -> None:
    assert set(TABLES) == MODULES
    found = {
        f"{module}.{name}": missing(table, name, value)
        for module, table in TABLES.items()
        for name, value in public(module).items()
    }
    assert {name: lacks for name, lacks in found.items() if lacks} == {}


def test_the_tables_name_only_what_exists() -> None:
    for module, table in TABLES.items():
        package = importlib.import_module(module)
        for name in (*table.cases, *table.nothing, *table.partly):
            parent, _, last = name.rpartition(".")
            home = importlib.import_module(f"{module}.{parent}") if parent else package
            assert hasattr(home, last), f"{module}.{name} is gone"
        assert not set(table.cases) & set(table.nothing)
        reasons = (*table.nothing.values(), *table.partly.values())
        assert all(len(reason) > 10 for reason in reasons)


def check_refusal(call: common.Call, wrong: str, folder: Path) -> str | None:
    """Why a call does not refuse its input in one line; None if it does."""
    folder.mkdir()
    try:
        call(folder)
    except ValueError as error:
        message = str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of ValueError: {error}"
    else:
        return "accepted"
    if not message or "\n" in message or len(message) >= 400:
        return f"not one line: {message!r}"
    if wrong in common.KINDS and "expected" not in message:
        return f"does not name what was expected: {message}"
    return None


@pytest.mark.parametrize("cases", CASES)
def test_bad_input_is_refused_in_one_line(cases: common.Cases, tmp_path: Path) -> None:
    found = {
        wrong: check_refusal(call, wrong, tmp_path / str(index))
        for index, (wrong, call) in enumerate(cases.items())
    }
    assert {wrong: fault for wrong, fault in found.items() if fault} == {}


def test_a_gap_in_a_table_is_named() -> None:
    def new(images: Tensor) -> Tensor:
        return images

    cases = {"shape": lambda _: new(1), "dtype": lambda _: new(2)}  # type: ignore[arg-type]
    assert missing(common.Table("m", {}), "new", new) == "no case"
    assert "['empty', 'range']" in str(missing(common.Table("m", {"new": cases}), "new", new))
    assert missing(common.Table("m", {}, nothing={"new": "an identity"}), "new", new) is None


def test_what_is_not_refused_is_named(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise KeyError("shape")

    def refuse(_: Path) -> None:
        raise ValueError("expected images, got none")

    assert check_refusal(lambda _: None, "shape", tmp_path / "a") == "accepted"
    assert "KeyError" in str(check_refusal(fail, "shape", tmp_path / "b"))
    assert check_refusal(refuse, "shape", tmp_path / "c") is None
