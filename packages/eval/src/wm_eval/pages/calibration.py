"""Error rates of detectors on many models: false alarms, backdoors found, attacks by detectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from defense_nc import Verdict
from wm_eval.config import SPLITS
from wm_eval.numbers import Number
from wm_eval.population import (
    ALL_SETTINGS,
    COMBINED,
    MIN_MODELS,
    Population,
    Rate,
    Row,
    detectors_in_order,
    judge_shipped,
    population_scans,
    summarise,
    together,
)
from wm_eval.records import Record, StudyRecords
from wm_eval.render import ABSENT, Page, Table, percent, split_headers
from wm_eval.titles import ATTACKS, CALIBRATED, CLEAN, attack_title, detector_title

_PAPER = "paper's rule"


def calibration_page(
    study: StudyRecords,
    *,
    floor: float = 0.9,
    alpha: float = 0.05,
    beside: Sequence[StudyRecords] = (),
) -> Page:
    """False alarms, backdoors found, attacks by detectors, and what is done of the plan.

    Args:
        study: Its records.
        floor: Attack success that a backdoored model must have to be judged.
        alpha: Share of clean models that may be called backdoored.
        beside: Records of others, whose clean models join the null distributions (`summarise`).

    Raises:
        ValueError: As `summarise`.
    """
    scans = population_scans(study)
    joining = [record for other in beside for record in population_scans(other)]
    population = summarise(scans, floor=floor, alpha=alpha, beside=joining)
    tables = population_tables(population, floor=floor, alpha=alpha)
    tables += _plan_table(study, scans)
    about = ""
    if study.failures:
        names = ", ".join(failure.id for failure in study.failures)
        about = f"Not in these tables, because a stage failed: {names}."
    title = "Error rates of the detectors, on many small models"
    every = tuple(n for row in population.rows for n in _row_numbers(row))
    return Page("population", title, about, tuple(tables), every)


def population_tables(
    population: Population, *, floor: float = 0.9, alpha: float = 0.05
) -> list[Table]:
    """Clean models, backdoored models, and attacks by detectors."""
    return [
        _clean_table(population, alpha),
        _backdoored_table(population, floor),
        _cross_table(population),
    ]


def shipped_table(studies: Mapping[str, StudyRecords], *, floor: float = 0.9) -> Table:
    """What the calibrations that ship say of models that they were not fitted to.

    Args:
        studies: By name: records of studies with scans.
        floor: Attack success that a backdoored model must have to be counted.
    """
    rows = []
    for name, study in studies.items():
        judged_by = judge_shipped(study)
        every = " + ".join(map(detector_title, together(judged_by)))
        for detector, judged in judged_by.items():
            clean = [j for j in judged if j.record.key["attack"] == CLEAN]
            bad = [j for j in judged if (j.record.values["asr"] or 0.0) >= floor]
            bad = [j for j in bad if j.record.key["attack"] != CLEAN]
            unsure = [
                str(sum(j.verdict is Verdict.INCONCLUSIVE for j in models))
                for models in (clean, bad)
            ]
            accused = Rate(sum(j.backdoored for j in clean), len(clean)) if clean else None
            hits = Rate(sum(j.correct for j in bad), len(bad)) if bad else None
            title = every if detector == COMBINED else detector_title(detector)
            rows.append((name, title, _rate(accused), unsure[0], _rate(hits), unsure[1]))
    headers = split_headers(
        "study | detector | clean models called backdoored | inconclusive | "
        "target named, of backdoored models | inconclusive"
    )
    note = (
        "Recorded scans, judged anew by the calibrations that ship, at a false-positive rate of "
        "0.05; those that are judged together share it. Backdoored models with an attack success "
        f"of {floor:.0%} or more, of every attack of the study. Intervals are exact, 95 %."
    )
    return Table("shipped", "Models of other studies", headers, tuple(rows), note)


def _clean_table(population: Population, alpha: float) -> Table:
    titles = _titles(population)
    rows = tuple(
        (
            titles[row.detector],
            row.setting,
            str(row.judged),
            _rate(row.flagged),
            str(row.inconclusive),
            _rate(row.paper_flagged),
        )
        for row in population.rows
        if row.attack == CLEAN
    )
    counts = {group: len(c.models) for group, c in population.calibrations.items()}
    note = (
        f"Clean models, judged at a false-positive rate of {alpha:g}. The null distribution comes "
        f"from other clean models ({_group_counts(population, counts)}): those of the calibration "
        "split, and for a network of the unseen split those of all other networks of that split. "
        "Intervals are exact, 95 %."
    )
    if population.left_out:
        few = _group_counts(population, population.left_out)
        note += f" Not judged, with fewer than {MIN_MODELS} clean models to calibrate on: {few}."
    head = ("detector", "setting", "models", "called backdoored", "inconclusive")
    return Table("clean", "False alarms", (*head, f"{_PAPER} (index > 2)"), rows, note)


def _backdoored_table(population: Population, floor: float) -> Table:
    titles = _titles(population)
    rows = tuple(
        (
            titles[row.detector],
            attack_title(row.attack),
            row.setting,
            f"{row.judged} of {row.trained}",
            percent(row.asr_min),
            _rate(row.named),
            str(row.inconclusive),
            _rate(row.paper_named),
            _auroc_cell(row),
            ABSENT if row.paper_auroc is None else f"{row.paper_auroc:.3f}",
        )
        for row in population.rows
        if row.attack != CLEAN
    )
    note = (
        f"Only models with an attack success of at least {floor:.0%} on "
        "held-out images are judged; every model has a target of its own. AUROC is against the "
        "clean models of the same settings, with a bootstrap interval."
    )
    headers = split_headers(
        "detector | attack | setting | judged | lowest ASR | target named | inconclusive | "
        f"{_PAPER}: target named | AUROC (95 %) | AUROC, {_PAPER}"
    )
    return Table("backdoored", "Backdoors found", headers, rows, note)


def _cross_table(population: Population) -> Table:
    """Attacks by detectors, over all settings."""
    single = Counter((row.attack, row.detector) for row in population.rows)
    whole = {
        (row.attack, row.detector): row
        for row in population.rows
        if row.setting == ALL_SETTINGS or single[row.attack, row.detector] == 1
    }
    rows = []
    for attack in dict.fromkeys(row.attack for row in population.rows):
        cells = [whole.get((attack, detector)) for detector in population.judged]
        asr = [c.asr_min for c in cells if c is not None and c.asr_min is not None]
        rates = [None if c is None else c.flagged if attack == CLEAN else c.named for c in cells]
        rows.append((attack_title(attack), percent(min(asr, default=None)), *map(_rate, rates)))
    titles = _titles(population)
    headers = ("attack", "lowest ASR", *(titles[name] for name in population.judged))
    note = "Backdoored models whose true target was named; clean models called backdoored."
    if _others(population):
        note += " Not every detector has seen the same models."
    return Table("cross", "Attacks by detectors", headers, tuple(rows), note)


def _plan_table(study: StudyRecords, scans: Sequence[Record]) -> list[Table]:
    """How many of the planned models each detector has scanned; nothing without a plan."""
    plans = {
        setting: splits
        for record in study.select(kind="study")
        for setting, splits in record.values.get("planned", {}).get("settings", {}).items()
    }
    names = ("setting", "split", "attack", "detector")
    done = Counter(tuple(str(r.key.get(name, "")) for name in names) for r in scans)
    detectors = detectors_in_order(scans)
    rows = tuple(
        (
            setting,
            split,
            attack_title(attack),
            *(f"{done[setting, split, attack, name]} of {count}" for name in detectors),
        )
        for setting, plan in plans.items()
        for split in SPLITS
        for attack in (CLEAN, *(name for name in ATTACKS if name != CLEAN))
        if (count := plan.get(split, {}).get(attack, 0))
    )
    headers = ("setting", "split", "models", *map(detector_title, detectors))
    note = "Models scanned, of those planned when the population was last worked on."
    return [Table("coverage", "What is done", headers, rows, note)] if rows else []


def _row_numbers(row: Row) -> Iterator[Number]:
    """Counts with the 95 % interval of their share of the judged models, and AUROC."""
    key = {"detector": row.detector, "attack": row.attack, "setting": row.setting}
    values: dict[str, float | None] = {
        name: getattr(row, name) for name in ("trained", "judged", "inconclusive", "asr_min")
    }
    for name in ("flagged", "named", "paper_flagged", "paper_named"):
        if (rate := getattr(row, name)) is not None:
            low, high = rate.interval
            values |= {name: rate.hits, f"{name}_low": low, f"{name}_high": high}
    values |= {"auroc": row.auroc, "paper_auroc": row.paper_auroc}
    if row.auroc_interval is not None:
        values |= {"auroc_low": row.auroc_interval[0], "auroc_high": row.auroc_interval[1]}
    for name, value in values.items():
        if value is not None:
            yield Number(name, key, float(value))


def _group_counts(population: Population, counts: Mapping[tuple[str, int], int]) -> str:
    """Counts by detector, with the number of classes where there are several."""
    groups = (*population.calibrations, *population.left_out)
    several = len({classes for _, classes in groups}) > 1
    titles = _titles(population)

    def name(detector: str, classes: int) -> str:
        return f"{titles[detector]} on {classes or 'any'} classes" if several else titles[detector]

    return "; ".join(f"{name(*group)}: {count}" for group, count in counts.items())


def _titles(population: Population) -> dict[str, str]:
    """What detectors are called; "all detectors" are those that are judged together."""
    names = (*population.judged, *(name for name, _ in population.left_out))
    titles = {name: detector_title(name) for name in names}
    pair = together(population.judged)
    combined = " + ".join(titles[name] for name in pair)
    combined = combined if {*titles} - {*pair, COMBINED} else "all detectors"
    return titles | {COMBINED: f"{combined}, together"}


def _others(population: Population) -> set[str]:
    """Detectors that are not calibrated in this project, judged or not."""
    names = {*population.judged, *(name for name, _ in population.left_out)}
    return names - {*CALIBRATED, COMBINED}


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return ABSENT
    low, high = rate.interval
    return f"{rate.hits} of {rate.n} ({100 * low:.0f} to {100 * high:.0f} %)"


def _auroc_cell(row: Row) -> str:
    if row.auroc is None or row.auroc_interval is None:
        return ABSENT
    low, high = row.auroc_interval
    return f"{row.auroc:.3f} ({low:.3f} to {high:.3f})"
