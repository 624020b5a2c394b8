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
from torch import nn

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


NAMES = [
    pytest.param(module, name, value, id=f"{module}.{name}")
    for module in sorted(TABLES)
    for name, value in public(module).items()
]
CASES = [
    pytest.param(call, wrong, id=f"{module}.{name}-{wrong.replace(' ', '_')}")
    for module, table in sorted(TABLES.items())
    for name, cases in table.cases.items()
    for wrong, call in cases.items()
]


def test_there_is_a_table_for_every_package() -> None:
    assert set(TABLES) == MODULES


@pytest.mark.parametrize(("module", "name", "value"), NAMES)
def test_every_public_name_has_a_refusal_case(module: str, name: str, value: object) -> None:
    table = TABLES[module]
    if takes_nothing(value) or name in table.nothing:
        return
    assert name in table.cases, f"{module}.{name} is public and nothing says what it refuses"
    if takes_tensors(value) and name not in table.partly:
        missing = common.KINDS - set(table.cases[name])
        assert not missing, f"{module}.{name} takes tensors and has no case for {missing}"
    if hasattr(value, "preset"):
        assert any(w.startswith("preset") for w in table.cases[name]), f"{name}.preset has no case"


@pytest.mark.parametrize("module", sorted(TABLES))
def test_the_tables_name_only_what_exists(module: str) -> None:
    table, package = TABLES[module], importlib.import_module(module)
    for name in (*table.cases, *table.nothing, *table.partly):
        parent, _, last = name.rpartition(".")
        home = importlib.import_module(f"{module}.{parent}") if parent else package
        assert hasattr(home, last), f"{module}.{name} is gone"
    assert not set(table.cases) & set(table.nothing)
    assert all(len(reason) > 10 for reason in (*table.nothing.values(), *table.partly.values()))


@pytest.mark.parametrize(("call", "wrong"), CASES)
def test_bad_input_is_refused_in_one_line(call: common.Call, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        call(tmp_path)
    message = str(refused.value)
    assert message and "\n" not in message and len(message) < 400, message
    if wrong in common.KINDS:
        assert "expected" in message, message


def test_a_new_public_name_without_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def brand_new(images: object) -> object:
        return images

    table = common.Table("wm_inject", {})
    monkeypatch.setitem(TABLES, "wm_inject", table)
    with pytest.raises(AssertionError, match="nothing says what it refuses"):
        test_every_public_name_has_a_refusal_case("wm_inject", "brand_new", brand_new)
