"""What every mitigation left of every backdoor, rendered from records and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES as ATTACK_TITLES
from wm_eval.attacks.render import Page, html_page, latex, markdown
from wm_eval.attacks.spread import counted, plus_minus
from wm_eval.cleaning.config import SCANNED_BY, TITLES
from wm_eval.cleaning.details import details_table, missing_table, rescan_table, scan_table
from wm_eval.cleaning.gather import (
    Cleaned,
    CleaningRecords,
    about,
    figures,
    read_cleaning,
    spread,
    tidy_csv,
)
from wm_eval.cleaning.mitigation import mitigation_figures, mitigation_page
from wm_eval.cleaning.paper import PAPER_ATTACK
from wm_eval.records import write_text
from wm_eval.tables import ABSENT, Table

_MEASURES = {"acc": "ACC", "asr": "ASR", "der": "DER"}
_NOTE = (
    "ACC: clean test images classified correctly, in percent. ASR: test images of other classes "
    "than the target that get the target label with the trigger in them, stored in 8 bits. DER: "
    "(loss of ASR - loss of ACC + 1) / 2, losses below zero counted as zero; 0.5 is what doing "
    "nothing earns. Where a scan named nothing, nothing was cleaned, and the figures are those of "
    'the victim; "forced" rows clean it all the same, with the true target\'s reversed trigger, '
    "which a defender could not know."
)
_CLEAN_NOTE = (
    "What each method costs where there is nothing to remove, in points of accuracy. Methods that "
    'wait for a verdict leave a model alone that their scan finds clean; "forced" rows unlearn '
    "the trigger of the label that stood out most."
)


def write_cleaning_tables(out: str | Path) -> list[Path]:
    """Write the tables of a cleaning.

    Args:
        out: Its folder, with ``records/`` and perhaps ``failures/``.

    Returns:
        ``tables/cleaning.{md,tex,csv,html}`` in it, and ``tables/mitigation.{md,tex,csv,html}``
        beside the paper's figures if WaNet was among the attacks. The same records give the same
        bytes.

    Raises:
        ValueError: No records, or none of a cleaning.
    """
    study = read_cleaning(out)
    numbers = figures(study)
    pages = [(cleaning_page(study), numbers)]
    beside = mitigation_page(study)
    if PAPER_ATTACK in study.attacks and beside.tables[0].rows:
        pages.append((beside, mitigation_figures(study, numbers)))
    paths = []
    for page, listed in pages:
        forms = {
            "md": markdown(page),
            "tex": latex(page),
            "csv": tidy_csv(page.name, page.data, listed),
            "html": html_page(page),
        }
        for ending, text in forms.items():
            paths.append(Path(out) / "tables" / f"{page.name}.{ending}")
            write_text(paths[-1], text)
    return paths


def cleaning_page(study: CleaningRecords) -> Page:
    """Attacks by methods, what the methods cost clean models, and every cleaning one by one."""
    tables = [_overview(study), _costs(study), scan_table(study), rescan_table(study)]
    tables += [details_table(study), missing_table(study)]
    kept = tuple(table for table in tables if table.rows)
    title = "What mitigations leave of a backdoor, and what they cost"
    return Page("cleaning", title, about(study), kept, (), study.about["name"])


def cleaning_headlines(study: CleaningRecords) -> list[str]:
    """One sentence a row of the main table: what the method left, with the most clean data."""
    told = []
    for attack, method, forced in _rows(study):
        shares = sorted({c.values["share"] for c in study.of(attack, method, forced=forced)})
        if not shares:
            continue
        mine = study.of(attack, method, forced=forced, share=shares[-1])
        before, after = (
            {m: _percent(c.values[when][m] for c in mine) for m in ("cda", "asr")}
            for when in ("before", "after")
        )
        done = sum(c.values["cleaned"] for c in mine)
        rating = plus_minus(spread(c.values["der"] for c in mine), digits=3)
        left = "" if done == len(mine) else f"; cleaned {done} of {len(mine)}"
        told.append(
            f"{ATTACK_TITLES[attack]}, {_title(method, forced)}, {100 * shares[-1]:g} % clean "
            f"data: ASR {before['asr']} to {after['asr']}, ACC {before['cda']} to {after['cda']}, "
            f"DER {rating}{left}"
        )
    return told


def _overview(study: CleaningRecords) -> Table:
    rows = []
    for attack, method, forced in _rows(study):
        mine = study.of(attack, method, forced=forced)
        if not mine:
            continue
        cells = [ATTACK_TITLES[attack], _title(method, forced), _done(mine)]
        cells += [_percent(_once(mine, name), unit="") for name in ("cda", "asr")]
        for share in study.shares:
            part = study.of(attack, method, forced=forced, share=share)
            cells += [
                _percent((c.values["after"][m] for c in part), unit="") for m in ("cda", "asr")
            ]
            cells.append(plus_minus(spread(c.values["der"] for c in part), digits=3))
        cells += [counted({c.values["steps"] for c in mine if c.values["cleaned"]}), _seeds(mine)]
        rows.append(tuple(cells))
    shares = [
        f"{title}, {100 * share:g} %" for share in study.shares for title in _MEASURES.values()
    ]
    headers = ("attack", "method", "cleaned", "ACC before", "ASR before", *shares)
    title = "Backdoored models, by share of clean data"
    return Table("cleaning", title, (*headers, "steps", "seeds"), tuple(rows), _NOTE)


def _costs(study: CleaningRecords) -> Table:
    """What each method does to clean models."""
    rows = []
    for method in study.methods:
        for forced in (False, True):
            mine = study.of(CLEAN, method, forced=forced)
            if not mine:
                continue
            cells = [_title(method, forced), _done(mine)]
            cells.append(_percent(_once(mine, "cda"), unit=""))
            for share in study.shares:
                part = study.of(CLEAN, method, forced=forced, share=share)
                changes = spread(c.values["acc_change"]["value"] for c in part)
                after = _percent((c.values["after"]["cda"] for c in part), unit="")
                cells += [after, plus_minus(changes, factor=100, digits=1, sign=True)]
            rows.append((*cells, _seeds(mine)))
    shares = [
        cell for s in study.shares for cell in (f"ACC, {100 * s:g} %", f"change, {100 * s:g} %")
    ]
    headers = ("method", "cleaned", "ACC before", *shares, "seeds")
    return Table("cleaning-clean", "Clean models", headers, tuple(rows), _CLEAN_NOTE)


def _rows(study: CleaningRecords) -> Iterable[tuple[str, str, bool]]:
    for attack in study.attacks:
        for method in study.methods:
            yield attack, method, False
            if method in SCANNED_BY:
                yield attack, method, True


def _title(method: str, forced: bool) -> str:
    return f"{TITLES[method]}, forced" if forced else TITLES[method]


def _done(mine: Sequence[Cleaned]) -> str:
    return f"{sum(c.values['cleaned'] for c in mine)} of {len(mine)}"


def _once(mine: Sequence[Cleaned], measure: str) -> list[float]:
    """A victim's figure before, once for each seed."""
    found: dict[int, Any] = {c.seed: c.values["before"][measure] for c in mine}
    return list(found.values())


def _percent(values: Iterable[float], *, unit: str = " %") -> str:
    text = plus_minus(spread(values), factor=100, digits=1)
    return text if text == ABSENT else f"{text}{unit}"


def _seeds(mine: Sequence[Cleaned]) -> str:
    return str(len({c.seed for c in mine}))


__all__ = [
    "cleaning_headlines",
    "cleaning_page",
    "write_cleaning_tables",
]
