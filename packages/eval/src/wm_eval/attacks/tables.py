"""The paper's two tables with our figures in them, rendered from records and from nothing else.

A figure is first a row of a tidy list (`gather.Number`). The tables are views of that list, with
means and standard deviations over seeds; the CSV is the list itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from wm_eval.attacks.coverage import Cell, coverage
from wm_eval.attacks.gather import (
    CLEAN,
    RECIPES,
    TITLES,
    AttackRecords,
    Number,
    Run,
    describe,
    read_study,
)
from wm_eval.attacks.learning import learning
from wm_eval.attacks.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE2_DATA
from wm_eval.attacks.render import Page, write_page
from wm_eval.attacks.spread import counted, over_seeds, plus_minus
from wm_eval.tables import ABSENT, Table


class Column(NamedTuple):
    """A column of Table 1, and which of the paper's five (None RM Ro Noise RS) it reads."""

    title: str
    paper: int


COLUMNS = {
    "none": Column("None", 0),
    "mask": Column("RM pixel", 1),
    "mask-block": Column("RM block", 1),
    "rotation": Column("Rotation", 2),
    "noise": Column("Noise gaussian", 3),
    "salt-pepper": Column("Noise salt-pepper", 3),
    "rescale": Column("Re-scale", 4),
}
# The paper has one mask and one noise and does not say which: two readings, five columns each.
AVERAGES = {
    "avg-pixel": ("none", "mask", "rotation", "noise", "rescale"),
    "avg-block": ("none", "mask-block", "rotation", "salt-pepper", "rescale"),
}
_AVERAGE_TITLES = ("AVG pixel, gaussian", "AVG block, salt-pepper")
MEASURES = {
    "cda": "Clean accuracy (CDA, %)",
    "asr": "Attack success (ASR, %)",
    "ftr": "False triggers (%)",
}
STEALTH = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}
_PAGES = {
    "plain": ("table1", "Table 1: attacks under corruption"),
    "corrupted": ("table1-corrupted", "Table 1 with victims that were trained under corruptions"),
}
_NOTES = {
    "cda": "Test images without a trigger that are classified correctly, after the corruption. "
    "AVG is the paper's: the mean of five columns, None among them, for each reading of its one "
    "mask and one noise; what it prints stands under both readings.",
    "asr": "Test images of other classes than the target that get the target label once the "
    "trigger is in them: trigger, 8 bits, corruption, classifier. The paper does not say whether "
    "it counts images of the target class; here they are left out.",
    "ftr": "The same images without the trigger, after the same corruption, that get the target "
    "label all the same. Attack success is worth what it has above this: a victim that always "
    "says the target has 100 % of both. The paper does not report it.",
}


def write_tables(out: str | Path) -> list[Path]:
    """Write every table that a study's records have figures for.

    Args:
        out: The study's folder, with ``records/`` and perhaps ``failures/``.

    Returns:
        The files ``tables/{table1,table1-corrupted,table2,learning}.{md,tex,csv,html}`` in it,
        without the tables for which nothing was tried. The same records give the same bytes.

    Raises:
        ValueError: No records, or none of a study of attacks.
    """
    study = read_study(out)
    pages = [table1(study, recipe) for recipe in RECIPES if study.started(recipe)]
    if study.stealth or any(f.stage.startswith("stealth-") for f in study.failures):
        pages.append(table2(study))
    pages += [learning(study)] if study.victims else []
    return [path for page in pages for path in write_page(Path(out) / "tables", page)]


def table1(study: AttackRecords, recipe: str = "plain") -> Page:
    """Attacks by corruptions: clean accuracy, attack success and false triggers.

    Args:
        study: The records.
        recipe: Of the victims, "plain" or "corrupted".

    Returns:
        One table a measure, then how much of them was measured and why the rest was not.

    Raises:
        ValueError: Another recipe.

    Source: Wang et al., "Spy-Watermark", Table 1. False triggers, the clean victim, both readings
        of mask and noise, and the rows that are marked so are ours.
    """
    if recipe not in _PAGES:
        raise ValueError(f"expected a recipe in {', '.join(_PAGES)}, got {recipe!r}")
    measured = [n for run in study.cells if run.recipe == recipe for n in _of_cell(study, run)]
    numbers = (*measured, *_paper_table1(study, recipe))
    name, title = _PAGES[recipe]
    tables = [_measure_table(study, f"{name}-{measure}", measure, numbers) for measure in MEASURES]
    expected = [
        Cell(attack, seed, measure, column)
        for attack in study.attacks()
        for seed in study.seeds(recipe)
        for measure in _measures(attack)
        for column in COLUMNS
    ]
    tables += coverage(study, name, "cell", expected, measured, recipe=recipe)
    return Page(name, title, describe(study, recipe), tuple(tables), numbers, study.name)


def table2(study: AttackRecords) -> Page:
    """How far triggered images are from the originals: PSNR, SSIM and LPIPS.

    Source: Wang et al., "Spy-Watermark", Table 2 (which is about CIFAR-10).
    """
    measured = [
        Number("", run.attack, measure, "", "measured", run.seed, found["mean"])
        for run, values in study.stealth.items()
        for measure in STEALTH
        if (found := values["stealth"].get(measure)) is not None
    ]
    printed = PAPER_TABLE2 if study.name == PAPER_TABLE2_DATA else {}
    paper = [
        Number("", attack, measure, "", "paper", None, getattr(row, measure))
        for attack, row in printed.items()
        for measure in STEALTH
    ]
    numbers = (*measured, *paper)
    attacks = [name for name in study.attacks() if name != CLEAN]
    rows = tuple(_stealth_row(attack, numbers) for attack in attacks)
    titles = [title for title, _ in STEALTH.values()]
    headers = ("attack", *(cell for t in titles for cell in (t, f"{t}, paper")), "seeds")
    note = (
        f"Means over {counted(values['n'] for values in study.stealth.values())} test images, each "
        "clamped and rounded to 8 bits first, then over seeds (± sample standard deviation). SSIM "
        "is taken over whole windows only, which weighs a mark at the very edge less than the "
        "padded form does. The paper does not name LPIPS's network."
    )
    tables = [Table("table2-stealth", "Stealth", headers, rows, note)]
    expected = [Cell(a, seed, m, "") for a in attacks for seed in study.seeds("") for m in STEALTH]
    tables += coverage(study, "table2", "stealth", expected, measured)
    return Page("table2", "Table 2: stealth", describe(study), tuple(tables), numbers, study.name)


def _measures(attack: str) -> tuple[str, ...]:
    """What there is to measure: a clean victim has no attack that could succeed."""
    return ("cda", "ftr") if attack == CLEAN else tuple(MEASURES)


def _of_cell(study: AttackRecords, run: Run) -> list[Number]:
    """The figures of one victim, averages included where their five columns are there."""
    found = study.cells[run]["corruptions"]
    numbers = []
    for measure in _measures(run.attack):
        values = {column: found[column][measure] for column in COLUMNS if column in found}
        for name, columns in AVERAGES.items():
            if all(column in values for column in columns):
                values[name] = fmean(values[column] for column in columns)
        numbers += [
            Number(run.recipe, run.attack, measure, column, "measured", run.seed, value)
            for column, value in values.items()
        ]
    return numbers


def _paper_table1(study: AttackRecords, recipe: str) -> list[Number]:
    """What the paper prints, under every column of ours that may be meant; as fractions."""
    return [
        Number(recipe, attack, measure, column, "paper", None, round(value / 100, 3))
        for attack, measures in PAPER_TABLE1.get(study.name, {}).items()
        for measure, row in measures.items()
        for column, value in [
            *((name, row.columns[column.paper]) for name, column in COLUMNS.items()),
            *((name, row.average) for name in AVERAGES),
        ]
    ]


def _measure_table(
    study: AttackRecords, name: str, measure: str, numbers: Sequence[Number]
) -> Table:
    mine = [n for n in numbers if n.measure == measure]
    columns = (*COLUMNS, *AVERAGES)
    rows = []
    for attack in study.attacks():
        if measure not in _measures(attack):
            continue
        spreads = [over_seeds(mine, attack, measure, column) for column in columns]
        cells = (plus_minus(s, factor=100, digits=1) for s in spreads)
        seeds = counted(s.n for s in spreads if s is not None)
        rows.append((TITLES.get(attack, attack), "measured", *cells, seeds))
        printed = {n.column: n.value for n in mine if (n.attack, n.source) == (attack, "paper")}
        if printed:
            cells = (f"{100 * printed[column]:.1f}" for column in columns)
            rows.append((TITLES[attack], "paper", *cells, ABSENT))
    titles = (*(column.title for column in COLUMNS.values()), *_AVERAGE_TITLES)
    headers = ("attack", "source", *titles, "seeds")
    return Table(name, MEASURES[measure], headers, tuple(rows), _NOTES[measure])


def _stealth_row(attack: str, numbers: Sequence[Number]) -> tuple[str, ...]:
    cells, spreads = [], []
    for measure, (_, digits) in STEALTH.items():
        spreads.append(over_seeds(numbers, attack, measure, ""))
        printed = [
            n.value
            for n in numbers
            if (n.attack, n.measure, n.source) == (attack, measure, "paper")
        ]
        cells += [
            plus_minus(spreads[-1], digits=digits),
            f"{printed[0]:.{digits}f}" if printed else ABSENT,
        ]
    seeds = counted(s.n for s in spreads if s is not None)
    return (TITLES.get(attack, attack), *cells, seeds)


__all__ = ["AVERAGES", "COLUMNS", "MEASURES", "STEALTH", "table1", "table2", "write_tables"]
