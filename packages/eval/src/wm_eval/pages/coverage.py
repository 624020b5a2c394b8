"""How much of a table was measured, and why the rest was not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from wm_eval.numbers import Number, reason
from wm_eval.records import Key, StudyRecords
from wm_eval.render import ABSENT, Table, percent
from wm_eval.titles import attack_title


def coverage(
    study: StudyRecords,
    name: str,
    kinds: Sequence[str],
    expected: Sequence[tuple[str, Key]],
    measured: Iterable[Number],
) -> list[Table]:
    """How many cells are filled, and what is missing and why.

    Args:
        study: Its records and failures.
        name: Of the table.
        kinds: The stages whose failure explains an empty cell, the nearest first.
        expected: Measure and key of every cell, one for each seed.
        measured: What there is.
    """
    filled = {(n.measure, *_place(n.key)) for n in measured}
    there = [(measure, *_place(key)) in filled for measure, key in expected]
    cells: dict[tuple[Any, ...], bool] = {}
    for (measure, key), done in zip(expected, there, strict=True):
        cell_key = (measure, key["attack"], key.get("corruption"))
        cells[cell_key] = cells.get(cell_key, False) or done
    counts = (
        ("cells of the table with at least one seed", sum(cells.values()), len(cells)),
        ("the same, seed by seed", sum(there), len(there)),
    )
    rows = tuple((w, str(n), str(of), percent(n / of) if of else ABSENT) for w, n, of in counts)
    tables = [Table(f"{name}-coverage", "Coverage", ("what", "filled", "of", "share"), rows)]
    missing: dict[tuple[Any, Any], list[tuple[str, Key]]] = {}
    for cell, done in zip(expected, there, strict=True):
        if not done:
            missing.setdefault((cell[1]["attack"], cell[1]["seed"]), []).append(cell)
    lines = []
    for (attack, seed), absent in missing.items():
        of = sum((k["attack"], k["seed"]) == (attack, seed) for _, k in expected)
        which = ", ".join(f"{m} {k.get('corruption', '')}".strip() for m, k in absent)
        what = f"all {of} cells" if len(absent) == of else which
        lines.append((attack_title(attack), str(seed), what, _why(study, kinds, absent)))
    if lines:
        headers = ("attack", "seed", "missing", "reason")
        tables.append(Table(f"{name}-missing", "What is missing, and why", headers, tuple(lines)))
    return tables


def _place(key: Key) -> tuple[Any, ...]:
    return tuple(key.get(name) for name in ("attack", "corruptions", "seed", "corruption"))


def _why(study: StudyRecords, kinds: Sequence[str], absent: Sequence[tuple[str, Key]]) -> str:
    key = {name: value for name, value in absent[0][1].items() if name != "corruption"}
    records = study.select(kind=kinds[0], **key)
    if not records:
        return reason(study, kinds, key)
    values = records[0].values.get("stealth", {})
    said = [values.get(f"{measure}_absent") for measure, _ in absent]
    return next((text for text in said if text), "not among the numbers of its record")
