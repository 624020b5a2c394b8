"""Check the import graph: edges between packages, cycles between modules, folders without torch.

Run `python tools/check_graph.py` from the root. It prints one line for each violation and exits 1.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
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
# Importing a module of these packages must not import torch, and they must not import it later.
TORCH_FREE = ("wm_inject.runtime", "wm_inject.serve")


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


def list_modules(root: Path) -> dict[str, Path]:
    """The modules of all packages, by their dotted names."""
    names = {}
    for source in root.glob("packages/*/src"):
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def module_imports(path: Path, modules: Mapping[str, Path], *, lazy: bool) -> Iterator[str]:
    """Dotted names of a module's imports, without those for type checkers.

    Args:
        path: The module.
        modules: Of `list_modules`, to tell ``from package import module`` from other names.
        lazy: Those inside functions as well.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in names)
        pending += ast.iter_child_nodes(node)


def cycles(modules: Mapping[str, Path]) -> Iterator[str]:
    """A line for each cycle of imports between modules, those inside functions included."""
    graph = {
        name: {other for other in module_imports(path, modules, lazy=True) if other in modules}
        for name, path in modules.items()
    }
    graph = {name: others - {name} for name, others in graph.items()}
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            first, second, *_ = error.args[1]
            yield f"import cycle: {' <- '.join(error.args[1])}"
            graph[second].discard(first)  # to find the next one
        else:
            return


def torch_imports(modules: Mapping[str, Path]) -> Iterator[str]:
    """A line for each way from a package in `TORCH_FREE` to torch."""
    for start in sorted(modules):
        if not any(f"{start}.".startswith(f"{package}.") for package in TORCH_FREE):
            continue
        if any(_is_torch(name) for name in module_imports(modules[start], modules, lazy=True)):
            yield f"{start} may not import torch"
        before: dict[str, str] = {start: ""}  # module -> the one that imports it
        pending = [start]
        while pending:
            module = pending.pop()
            for name in module_imports(modules[module], modules, lazy=False):
                if _is_torch(name) and module != start:
                    yield f"{start} imports torch by way of {_way(module, before)}"
                parts = name.split(".")
                parents = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
                for parent in parents:
                    if parent in modules and parent not in before:
                        before[parent] = module
                        pending.append(parent)


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "torchvision", "timm")


def _way(module: str, before: Mapping[str, str]) -> str:
    names = [module]
    while before[names[-1]]:
        names.append(before[names[-1]])
    return " <- ".join(names)


def violations(root: Path = ROOT) -> list[str]:
    """Every violation under ``root``, one line each."""
    folders = {path.parent.name for path in (root / "packages").glob("*/pyproject.toml")}
    found = [
        f"packages/{name}: not one of the six packages" for name in sorted(folders - set(GRAPH))
    ]
    found += [f"packages/{name}: missing" for name in sorted({*GRAPH} - folders)]
    for folder in sorted(folders & {*GRAPH}):
        found += package_violations(root, folder)
    modules = list_modules(root)
    return [*found, *cycles(modules), *torch_imports(modules)]


def main() -> int:
    """Print the violations; 1 if there is one."""
    found = violations()
    print("\n".join(found) if found else "the import graph holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
