"""Do the tests notice a wrong sign? One small error at a time is put into a module; its tests run.

    python tools/mutate.py              # all modules of TARGETS
    python tools/mutate.py anomaly      # those whose file's name begins so

Swapped are comparisons, arithmetic, ``and`` and ``or``; numbers are shifted, conditions negated,
True and False exchanged, min and max too. A mutant that no test notices survives and is printed
with its line: either a test is missing, or the change makes no difference. What is known to make
none stands in EQUIVALENT with the reason. Exit 1 where an unknown one survives.

Mutants are forks of one process that has imported torch and pytest already, one after the other.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120  # a mutant that loops for ever is noticed too


class Target(NamedTuple):
    """A module, and the test files that have to notice whatever goes wrong in it."""

    module: str
    source: str
    tests: tuple[str, ...]


TARGETS = (
    Target(
        "defense_nc.verdict.anomaly",
        "packages/defense-nc/src/defense_nc/verdict/anomaly.py",
        (
            "packages/defense-nc/tests/test_anomaly.py",
            "packages/defense-nc/tests/test_properties_anomaly.py",
        ),
    ),
    Target(
        "wm_victim.inference",
        "packages/victim/src/wm_victim/inference.py",
        (
            "packages/victim/tests/test_inference.py",
            "packages/victim/tests/test_properties_measure.py",
        ),
    ),
    Target(
        "wm_victim.metrics",
        "packages/victim/src/wm_victim/metrics.py",
        ("packages/victim/tests/test_properties_measure.py",),
    ),
    Target(
        "wm_eval.intervals",
        "packages/eval/src/wm_eval/intervals.py",
        (
            "packages/eval/tests/test_intervals.py",
            "packages/eval/tests/test_properties_intervals.py",
        ),
    ),
)

# (the line of code, its change) -> why no test can tell.
_SPEED = "how many images at once changes the speed alone"
_ROUNDING = "the sum lies below 1 but for its last bit"
EQUIVALENT: dict[tuple[str, str], str] = {
    (line, "512 -> 513"): _SPEED
    for line in (
        "def predict(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:",
        "def accuracy(model: nn.Module, data: ImageSet, *, batch_size: int = 512) -> float:",
        "model: nn.Module, data: ImageSet, trigger: Trigger, *, target: int, batch_size: int = 512",
    )
} | {
    ("_BATCH = 256  # images that a trigger gets at once", "256 -> 257"): _SPEED,
    ("high = 1.0 if successes == n else min(1.0, centre + half)", "1.0 -> 2.0"): _ROUNDING,
    ("return min(1.0, math.fsum(terms))", "1.0 -> 2.0"): _ROUNDING,
    ("for _ in range(60):", "60 -> 61"): "sixty halvings reach the last bit of a float",
    (
        "if rising(middle) < goal:",
        "rising(middle) < goal -> rising(middle) <= goal",
    ): "where the goal is met exactly, either end moves there and the other follows",
}

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min"}


class Mutant(NamedTuple):
    """A module with one change."""

    tree: ast.Module
    line: int
    code: str  # that line
    change: str  # "old -> new"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that may stand in the place of this one."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            compared = copy.deepcopy(node)
            compared.ops[index] = _SWAPS[type(operator)]()  # type: ignore[call-overload]
            yield compared
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        other = copy.deepcopy(node)
        other.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
        yield other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield ast.Name(_NAMES[node.id], node.ctx)


def mutants(text: str) -> Iterator[Mutant]:
    """Every mutant of a module, from top to bottom.

    What only words an error is left alone, and annotations, which are not evaluated.
    """
    tree, lines = ast.parse(text), text.splitlines()
    without_effect = [
        part
        for node in ast.walk(tree)
        for part in (
            node if isinstance(node, ast.Raise) else None,
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
        )
        if part is not None
    ]
    spared = {id(node) for part in without_effect for node in ast.walk(part)}
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for index, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in spared:
                    continue
                for other in changes(node):
                    ast.copy_location(other, node)
                    place = list(value) if isinstance(value, list) else value
                    if isinstance(place, list):
                        place[index] = other
                    setattr(parent, field, place if isinstance(place, list) else other)
                    whole = ast.fix_missing_locations(copy.deepcopy(tree))
                    setattr(parent, field, value)
                    change = f"{ast.unparse(node)} -> {ast.unparse(other)}"
                    line = getattr(node, "lineno", 1)
                    yield Mutant(whole, line, lines[line - 1].strip(), change)


def noticed(target: Target, tree: ast.Module) -> bool:
    """Whether the tests fail, in a fork, with this tree in the place of the module."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_S)
        os._exit(_with_mutant(target, tree))
    _, status = os.waitpid(child, 0)
    return status != 0


def _with_mutant(target: Target, tree: ast.Module) -> int:
    """The exit status of the tests with the mutant in the place of the module."""
    spec = importlib.util.find_spec(target.module)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[target.module] = module
    try:
        exec(compile(tree, str(ROOT / target.source), "exec"), module.__dict__)
    except Exception:
        return 1
    home, _, own = target.module.partition(".")
    package = importlib.import_module(home)
    setattr(package, own, module)
    for name in getattr(package, "__all__", ()):
        # What the package gives from this module under its own name.
        if getattr(getattr(package, name), "__module__", "") == target.module:
            setattr(package, name, getattr(module, name))
    return run_tests(target)


def run_tests(target: Target) -> int:
    """The exit status of pytest, which prints nothing; its test modules are imported anew."""
    tests = [str(ROOT / path) for path in target.tests]
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) in tests:
            del sys.modules[name]
    options = ["-x", "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
    mode = [f"--rootdir={ROOT}", "--import-mode=importlib", "-m", "not slow"]
    return int(pytest.main([*options, *mode, *tests]))


def check(target: Target) -> tuple[int, list[Mutant]]:
    """How many mutants there are, and those that no test noticed.

    Raises:
        ValueError: The tests fail without any change.
    """
    importlib.import_module(target.module)
    if run_tests(target):  # here and not in a fork: what they import is there for every mutant
        raise ValueError(f"the tests of {target.module} fail as it stands")
    every = list(mutants((ROOT / target.source).read_text(encoding="utf-8")))
    survivors = [mutant for mutant in every if not noticed(target, mutant.tree)]
    return len(every), sorted(survivors, key=lambda mutant: mutant.line)


def main(argv: Sequence[str] | None = None) -> int:
    """Mutate, print survivors and counts; 1 where one survived that EQUIVALENT does not explain."""
    parser = argparse.ArgumentParser(
        prog="mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="how the module's file name begins")
    names = tuple(parser.parse_args(argv).names)
    unknown = 0
    for target in TARGETS:
        file = Path(target.source).name
        if names and not file.startswith(names):
            continue
        total, survivors = check(target)
        for mutant in survivors:
            why = EQUIVALENT.get((mutant.code, mutant.change))
            unknown += why is None
            print(
                f"{file}:{mutant.line}: {mutant.change}" + (f"  ({why})" if why else "  SURVIVED")
            )
        print(f"{file}: {total - len(survivors)} of {total} mutants noticed", flush=True)
    return int(unknown > 0)


if __name__ == "__main__":
    sys.exit(main())
