"""Packages whose public names are imported when they are first used (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, from its own source.

    The public names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, beside
    ``__version__``; type checkers read the same lines. A name must not be that of a submodule,
    which would hide it.

    Args:
        package: ``__name__`` of the package.
    """
    module = sys.modules[package]
    source: str = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    origins = {
        alias.asname or alias.name: (node.module, alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def __getattr__(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, original = origins[name]
        value = getattr(import_module(str(home)), original)
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *origins})

    return __getattr__, __dir__, sorted([*origins, "__version__"])
