"""The tables of a population: error rates of every detector, and the cross table beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES
from wm_eval.detectors import CALIBRATED, DETECTORS
from wm_eval.population.config import EVERYWHERE
from wm_eval.population.counts import Rate, Row
from wm_eval.population.plan import coverage_table
from wm_eval.population.summary import (
    LEAST,
    TOGETHER,
    Population,
    read_scans,
    summarise,
)
from wm_eval.records import write_text
from wm_eval.tables import ABSENT, Table, percent, to_markdown

_PAPERS_RULE = "paper's rule"
_PLAIN = ("detector", "attack", "world", "trained", "judged", "inconclusive", "asr_min")
_RATES = ("flagged", "named", "paper_flagged", "paper_named")
_COLUMNS = (
    *_PLAIN,
    *(f"{name}{end}" for name in (*_RATES, "auroc") for end in ("", "_low", "_high")),
    "paper_auroc",
)


def write_population(out: str | Path, *, floor: float = 0.9, alpha: float = 0.05) -> list[Path]:
    """Write the tables of a population from its records, as Markdown and as a tidy CSV.

    In the CSV, ``NAME_low`` and ``NAME_high`` are the 95 % interval of ``NAME``: of a count, that
    of its share of the judged models, in [0, 1].

    Args:
        out: The population's folder.
        floor: Attack success that a backdoored model must have to be judged.
        alpha: Share of clean models that may be called backdoored.

    Raises:
        ValueError: No scans, or too few clean ones to calibrate on.
    """
    scans = read_scans(out)
    found = summarise(scans, floor=floor, alpha=alpha)
    tables = population_tables(found, floor, alpha)
    if (covered := coverage_table(out, scans)) is not None:
        tables.append(covered)
    folder = Path(out) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(to_markdown(table) for table in tables)
    failed = sorted(Path(out).glob("*/failures/*.json"))
    if failed:
        names = ", ".join(f"{path.parent.parent.name}/{path.stem}" for path in failed)
        text += f"\nNot in these tables, because a stage failed: {names}.\n"
    paths = [folder / "population.md", folder / "population.csv"]
    write_text(paths[0], text)
    write_text(paths[1], _csv(found.rows))
    return paths


def population_tables(found: Population, floor: float = 0.9, alpha: float = 0.05) -> list[Table]:
    """Clean models, backdoored models, and attacks by detectors."""
    return [_clean_table(found, alpha), _backdoored_table(found, floor), _cross_table(found)]


def _clean_table(found: Population, alpha: float) -> Table:
    titles = _titles(found)
    rows = [
        (
            titles[row.detector],
            row.world,
            str(row.judged),
            _rate(row.flagged),
            str(row.inconclusive),
            _rate(row.paper_flagged),
        )
        for row in found.rows
        if row.attack == CLEAN
    ]
    counts = "; ".join(
        f"{_group(found, name, classes)}: {len(calibration.models)}"
        for (name, classes), calibration in found.calibrations.items()
    )
    note = (
        f"Clean models of the test half, judged at a false-positive rate of {alpha:g}. The null "
        f"distribution comes from other clean models, of the calibration half ({counts}). "
        "Intervals are exact, 95 %."
    )
    if found.left_out:
        few = "; ".join(
            f"{_group(found, name, classes)}: {count}"
            for (name, classes), count in found.left_out.items()
        )
        note += f" Not judged, with fewer than {LEAST} clean models to calibrate on: {few}."
    headers = (
        "detector",
        "world",
        "models",
        "called backdoored",
        "inconclusive",
        f"{_PAPERS_RULE} (index > 2)",
    )
    return Table("clean", "False alarms", headers, tuple(rows), note)


def _backdoored_table(found: Population, floor: float) -> Table:
    titles = _titles(found)
    rows = [
        (
            titles[row.detector],
            _attack(row.attack),
            row.world,
            f"{row.judged} of {row.trained}",
            percent(row.asr_min),
            _rate(row.named),
            str(row.inconclusive),
            _rate(row.paper_named),
            _auroc(row),
            ABSENT if row.paper_auroc is None else f"{row.paper_auroc:.3f}",
        )
        for row in found.rows
        if row.attack != CLEAN
    ]
    note = (
        f"Models of the test half. Only models with an attack success of at least {floor:.0%} on "
        "held-out images are judged; every model has a target of its own. AUROC is against the "
        "clean models of the same worlds, with a bootstrap interval."
    )
    headers = (
        "detector",
        "attack",
        "world",
        "judged",
        "lowest ASR",
        "target named",
        "inconclusive",
        f"{_PAPERS_RULE}: target named",
        "AUROC (95 %)",
        f"AUROC, {_PAPERS_RULE}",
    )
    return Table("backdoored", "Backdoors found", headers, tuple(rows), note)


def _cross_table(found: Population) -> Table:
    """Attacks by detectors: how many of the models of all worlds were named."""
    whole = {
        (row.attack, row.detector): row
        for row in found.rows
        if row.world == EVERYWHERE or _only(found.rows, row)
    }
    names = list(dict.fromkeys(row.attack for row in found.rows))
    detectors = list(found.judged)
    rows = []
    for name in names:
        cells = [whole.get((name, detector)) for detector in detectors]
        asr = [c.asr_min for c in cells if c is not None and c.asr_min is not None]
        rates = [None if c is None else c.flagged if name == CLEAN else c.named for c in cells]
        rows.append((_attack(name), percent(min(asr, default=None)), *map(_rate, rates)))
    titles = _titles(found)
    headers = ("attack", "lowest ASR", *(titles[name] for name in detectors))
    note = "Backdoored models whose true target was named; clean models called backdoored."
    if _rivals(found):
        note += " Not every detector has seen the same models."
    return Table("cross", "Attacks by detectors", headers, tuple(rows), note)


def _only(rows: Sequence[Row], row: Row) -> bool:
    alike = [r for r in rows if (r.attack, r.detector) == (row.attack, row.detector)]
    return len(alike) == 1


def _group(found: Population, name: str, classes: int) -> str:
    """A detector's title, with the number of classes where there are several."""
    title = _titles(found)[name]
    several = len({count for _, count in (*found.calibrations, *found.left_out)}) > 1
    return f"{title} on {classes} classes" if several else title


def _titles(found: Population) -> dict[str, str]:
    """What detectors are called. All together are those of this house, whoever else is there."""
    names = (*CALIBRATED, *found.judged, *(name for name, _ in found.left_out))
    titles = {name: DETECTORS[name].title if name in DETECTORS else name for name in names}
    pair = " + ".join(titles[name] for name in CALIBRATED)
    return titles | {TOGETHER: f"{pair if _rivals(found) else 'all detectors'} (Bonferroni)"}


def _rivals(found: Population) -> set[str]:
    """Detectors that are not of this house, judged or not."""
    return {*found.judged, *(name for name, _ in found.left_out)} - {*CALIBRATED, TOGETHER}


def _attack(name: str) -> str:
    return TITLES.get(name, name)


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return ABSENT
    low, high = rate.interval
    return f"{rate.hits} of {rate.n} ({100 * low:.0f} to {100 * high:.0f} %)"


def _auroc(row: Row) -> str:
    if row.auroc is None or row.auroc_interval is None:
        return ABSENT
    low, high = row.auroc_interval
    return f"{row.auroc:.3f} ({low:.3f} to {high:.3f})"


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_cells, rows))
    return buffer.getvalue()


def _cells(row: Row) -> dict[str, Any]:
    """The cells of a row by column; None is written as nothing."""
    cells = {name: getattr(row, name) for name in (*_PLAIN, "auroc", "paper_auroc")}
    rates = {name: rate for name in _RATES if (rate := getattr(row, name)) is not None}
    cells |= {name: rate.hits for name, rate in rates.items()}
    intervals = {name: rate.interval for name, rate in rates.items()}
    for name, interval in (intervals | {"auroc": row.auroc_interval}).items():
        if interval is not None:
            cells[f"{name}_low"], cells[f"{name}_high"] = interval
    return cells


__all__ = ["population_tables", "write_population"]
