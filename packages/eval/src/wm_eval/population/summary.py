"""What a population says of its detectors: thresholds from one half, figures from the other.

Nothing is scanned anew here. The null distribution of a detector is fitted to the clean models of
the calibration half, and every model of the test half is judged by it from its recorded scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from defense_nc import (
    Calibration,
    CleanModel,
    Subject,
    Verdict,
    clean_model,
    fit_calibration,
    judge,
)
from wm_eval.attacks.config import CLEAN, TABLE
from wm_eval.population.config import check_rates
from wm_eval.population.counts import Judged, Row, Scan, count_rows
from wm_eval.records import Record, read_records

TOGETHER = "all"  # all detectors as one, each at its share of the error rate


class Population(NamedTuple):
    """Everything that is said of a population."""

    calibrations: Mapping[str, Calibration]  # by detector
    judged: Mapping[str, tuple[Judged, ...]]  # the test half, by detector
    rows: tuple[Row, ...]


def read_scans(out: str | Path) -> tuple[Scan, ...]:
    """Every recorded scan of a population, from the folders of its worlds.

    Raises:
        ValueError: There is none.
    """
    found = []
    for folder in sorted(Path(out).glob("*/records")):
        records: Mapping[str, Record] = read_records(folder)
        found += [
            Scan(
                folder.parent.name,
                name,
                {**record.values, "settings": record.config, "versions": dict(record.versions)},
            )
            for name, record in records.items()
            if name.startswith("scan-") and "half" in record.values
        ]
    if not found:
        raise ValueError(f"expected the scans of a population in {out}, found none")
    return tuple(found)


def calibrate(scans: Iterable[Scan]) -> Calibration:
    """The null distribution of one detector, from the clean models of the calibration half.

    Raises:
        ValueError: Fewer than five such models, or scans of either half with different settings.
    """
    scans = list(scans)
    settings = [s.values["settings"]["settings"]["detector"] for s in scans]
    if any(other != settings[0] for other in settings):
        raise ValueError("expected one set of detector settings in both halves, got more")
    mine = [s for s in scans if s.attack == CLEAN and s.values["half"] == "calibration"]
    models = [model for scan in mine if (model := _clean(scan)) is not None]
    if len(models) < 5:
        raise ValueError(f"expected at least 5 clean models to calibrate on, got {len(models)}")
    first = mine[0].values
    return fit_calibration(
        models,
        detector=first["detector"],
        preset=first["preset"],
        settings=settings[0],
        versions=first["versions"],
    )


def summarise(scans: Sequence[Scan], *, floor: float = 0.9, alpha: float = 0.05) -> Population:
    """Judge the test half and count.

    Args:
        scans: Of `read_scans`, both halves.
        floor: Attack success that a backdoored model must have to be judged.
        alpha: Share of clean models that may be called backdoored.

    Raises:
        ValueError: No scans, a rate out of range, or a detector without five clean models in the
            calibration half.
    """
    check_rates(floor=floor, alpha=alpha)
    if not scans:
        raise ValueError("expected at least one scan of a population, got none")
    calibrations: dict[str, Calibration] = {}
    judged: dict[str, tuple[Judged, ...]] = {}
    for detector in sorted({s.values["defence"] for s in scans}):
        mine = [s for s in scans if s.values["defence"] == detector]
        calibration = calibrate(mine)
        test = [s for s in mine if s.values["half"] == "test"]
        calibrations[detector] = calibration
        judged[detector] = tuple(_judge(scan, calibration, alpha) for scan in test)
    if len(judged) > 1:
        halves = [
            [_judge(j.scan, calibrations[d], alpha / len(judged)) for j in group]
            for d, group in judged.items()
        ]
        judged[TOGETHER] = _together(halves)
    rows = [
        row
        for detector, group in judged.items()
        for attack in (CLEAN, *TABLE)
        for row in count_rows(detector, attack, group, floor)
    ]
    return Population(calibrations, judged, tuple(rows))


def _clean(scan: Scan) -> CleanModel | None:
    values = scan.values
    return clean_model(
        _column(scan, "score"),
        _column(scan, "success_rate"),
        floor=values["floor"],
        subject=Subject(**values["subject"]),
        dataset=values["data"],
        arch=values["model"],
        name=f"{scan.world}/{scan.name}",
    )


def _judge(scan: Scan, calibration: Calibration, alpha: float) -> Judged:
    report = judge(
        scan.values["detector"],
        _column(scan, "score"),
        _column(scan, "success_rate"),
        floor=scan.values["floor"],
        alpha=alpha,
        calibration=calibration,
        subject=Subject(**scan.values["subject"]),
        seed=scan.values["seed"],
    )
    return Judged(
        scan,
        report.verdict,
        report.suspected,
        report.p_value,
        report.paper_index,
        report.paper_flagged,
    )


def _together(groups: Sequence[Sequence[Judged]]) -> tuple[Judged, ...]:
    """All detectors on the same models, each at its share of the error rate (Bonferroni).

    "backdoored" as soon as one says so, "clean" if all do.
    """
    by_model: dict[tuple[str, str, int], list[Judged]] = {}
    for judged in (j for group in groups for j in group):
        values = judged.scan.values
        key = (judged.scan.world, judged.scan.attack, values["seed"])
        by_model.setdefault(key, []).append(judged)
    out = []
    for same in by_model.values():
        if len(same) < len(groups):
            continue  # not every detector has seen it yet
        verdicts = {j.verdict for j in same}
        verdict = Verdict.INCONCLUSIVE
        if Verdict.BACKDOORED in verdicts:
            verdict = Verdict.BACKDOORED
        elif verdicts == {Verdict.CLEAN}:
            verdict = Verdict.CLEAN
        named = sorted({label for j in same if j.named for label in j.suspected})
        p_value = min(1.0, len(same) * min(j.p_value for j in same))
        out.append(Judged(same[0].scan, verdict, tuple(named), p_value, None, ()))
    return tuple(out)


def _column(scan: Scan, name: str) -> torch.Tensor:
    return torch.tensor([label[name] for label in scan.values["labels"]], dtype=torch.float64)


__all__ = ["TOGETHER", "Population", "calibrate", "read_scans", "summarise"]
