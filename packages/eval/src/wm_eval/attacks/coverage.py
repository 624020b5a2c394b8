"""How much of a table was measured, and why the rest was not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wm_eval.attacks.gather import TITLES, AttackRecords, Number, Run
from wm_eval.tables import ABSENT, Table, percent


class Cell(NamedTuple):
    """A place in a table that one seed should fill."""

    attack: str
    seed: int
    measure: str
    column: str


def coverage(
    study: AttackRecords,
    name: str,
    kind: str,
    expected: Sequence[Cell],
    measured: Iterable[Number],
    *,
    recipe: str = "",
) -> list[Table]:
    """Count the cells that are filled, and list every run that left some empty.

    Args:
        study: The records.
        name: Of the table that is counted.
        kind: The stage that fills it, "cell" or "stealth".
        expected: Its cells.
        measured: What there is; what is not expected (an average) does not count.
        recipe: Of its victims; "" for a table that has none.

    Returns:
        The counts, and behind them what is missing, if anything is.
    """
    there = {Cell(n.attack, n.seed, n.measure, n.column) for n in measured if n.seed is not None}
    cells = {cell._replace(seed=0) for cell in expected}
    filled = {cell._replace(seed=0) for cell in there} & cells
    counts = (
        ("cells of the table with at least one seed", len(filled), len(cells)),
        ("the same, seed by seed", sum(cell in there for cell in expected), len(expected)),
    )
    rows = tuple(
        (what, str(done), str(of), percent(done / of) if of else ABSENT)
        for what, done, of in counts
    )
    tables = [Table(f"{name}-coverage", "Coverage", ("what", "filled", "of", "share"), rows)]
    missing: dict[tuple[str, int], list[Cell]] = {}
    for cell in expected:
        if cell not in there:
            missing.setdefault((cell.attack, cell.seed), []).append(cell)
    if missing:
        lines = tuple(
            (
                TITLES.get(attack, attack),
                str(seed),
                _which(cells, sum((c.attack, c.seed) == (attack, seed) for c in expected)),
                _why(study, kind, Run(recipe, attack, seed), cells),
            )
            for (attack, seed), cells in missing.items()
        )
        headers = ("attack", "seed", "missing", "reason")
        tables.append(Table(f"{name}-missing", "What is missing, and why", headers, lines))
    return tables


def _which(missing: Sequence[Cell], of: int) -> str:
    if len(missing) == of:
        return f"all {of} cells"
    return ", ".join(f"{cell.measure} {cell.column}".strip() for cell in missing)


def _why(study: AttackRecords, kind: str, run: Run, missing: Sequence[Cell]) -> str:
    values = (study.cells if kind == "cell" else study.stealth).get(run)
    if values is None:
        return study.why(kind, run)
    absent = [values.get("stealth", {}).get(f"{cell.measure}_absent") for cell in missing]
    return next((reason for reason in absent if reason), "not among the figures of its record")


__all__ = ["Cell", "coverage"]
