"""Hold the import graph of the house: parse every import and pyproject, name each edge too many.

Run `python tools/check_graph.py` from the root. It prints one line for each violation and exits 1.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Who may import whom, in full. Folder -> (import name, the siblings it may use).
GRAPH: dict[str, tuple[str, frozenset[str]]] = {
    "wm-inject": ("wm_inject", frozenset()),
    "wm-extract": ("wm_extract", frozenset({"wm_inject"})),
    "victim": ("wm_victim", frozenset({"wm_inject"})),
    "defense-nc": ("defense_nc", frozenset({"wm_victim", "wm_inject"})),
    "defense-reverse": ("defense_reverse", frozenset({"defense_nc", "wm_victim", "wm_inject"})),
    "eval": (
        "wm_eval",
        frozenset({"wm_inject", "wm_extract", "wm_victim", "defense_nc", "defense_reverse"}),
    ),
}
MODULES = frozenset(module for module, _ in GRAPH.values())
# Folder names, and the tools above the packages: nothing inside a package imports one of these.
FORBIDDEN = frozenset({"eval", "victim", "tools"})


def imported(source: str) -> Iterator[tuple[int, str]]:
    """The line and the top-level name of every absolute import, lazy and literal ones included.

    Args:
        source: Python source text.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            by_name = called in ("import_module", "__import__", "importorskip")
            if by_name and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value.partition(".")[0]


def required(pyproject: Path) -> set[str]:
    """The import names of the siblings that a pyproject requires, extras included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    texts: list[str] = list(project.get("dependencies", []))
    for extra in project.get("optional-dependencies", {}).values():
        texts += extra
    names = {re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0] for text in texts}
    return {re.sub(r"[-_.]+", "_", name).lower() for name in names} & MODULES


def package_violations(root: Path, folder: str) -> Iterator[str]:
    """One line for each edge of one package that the graph does not allow."""
    module, allowed = GRAPH[folder]
    home = root / "packages" / folder
    declared = required(home / "pyproject.toml")
    for extra in sorted(declared - allowed):
        yield f"packages/{folder}/pyproject.toml: {module} may not require {extra}"
    for path in sorted(home.rglob("*.py")):
        inside = path.relative_to(root).as_posix()
        for line, name in imported(path.read_text(encoding="utf-8")):
            if name in FORBIDDEN or name in MODULES - allowed - {module}:
                yield f"{inside}:{line}: {module} may not import {name}"
            elif name in allowed - declared:
                yield f"{inside}:{line}: {name} is imported but not required in pyproject.toml"


def violations(root: Path = ROOT) -> list[str]:
    """Every violation of the import graph under ``root``, one line each."""
    folders = {path.parent.name for path in (root / "packages").glob("*/pyproject.toml")}
    found = [
        f"packages/{name}: not one of the six packages" for name in sorted(folders - set(GRAPH))
    ]
    found += [f"packages/{name}: missing" for name in sorted({*GRAPH} - folders)]
    for folder in sorted(folders & {*GRAPH}):
        found += package_violations(root, folder)
    return found


def main() -> int:
    """Print the violations; 1 if there is one."""
    found = violations()
    print("\n".join(found) if found else "the import graph holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
