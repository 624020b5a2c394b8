"""What a population says of its detectors: thresholds from one half, figures from the other.

Nothing is scanned anew here. The null distribution of a detector is fitted to the clean models of
the calibration half, one for each number of classes, and every model of the test half is judged by
it from its recorded scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from defense_nc import (
    Calibration,
    CleanModel,
    ModelInfo,
    Verdict,
    clean_model,
    fit_calibration,
    judge,
)
from wm_eval.attacks.config import CLEAN, TABLE
from wm_eval.detectors import CALIBRATED
from wm_eval.population.config import check_rates
from wm_eval.population.counts import Judged, Row, Scan, count_rows
from wm_eval.records import Record, read_records

TOGETHER = "all"  # both detectors of this house as one, each at its share of the error rate
LEAST = 5  # clean models of the calibration half, or a detector is not judged


class Population(NamedTuple):
    """Everything that is said of a population."""

    calibrations: Mapping[tuple[str, int], Calibration]  # by detector and number of classes
    judged: Mapping[str, tuple[Judged, ...]]  # the test half, by detector
    rows: tuple[Row, ...]
    # By detector and number of classes: the clean models, where they are too few to calibrate on.
    left_out: Mapping[tuple[str, int], int]


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

    Args:
        scans: Of models with as many classes.

    Raises:
        ValueError: Fewer than five such models, or scans of either half with different settings or
            numbers of images.
    """
    scans = list(scans)
    models = _clean_models(scans)
    if len(models) < LEAST:
        raise _too_few(len(models))
    first = next(s for s in scans if _may_teach(s)).values
    return fit_calibration(
        models,
        detector=first["detector"],
        preset=first["preset"],
        settings=first["settings"]["settings"]["detector"],
        versions=first["versions"],
    )


def summarise(scans: Sequence[Scan], *, floor: float = 0.9, alpha: float = 0.05) -> Population:
    """Judge the test half and count.

    Detectors need not have seen the same models: each is judged by its own calibrations on what it
    has seen. Scans for whose number of classes a detector cannot be calibrated are left out. The
    two of this house together are judged on the models that both have seen, whatever other
    detectors there are.

    Args:
        scans: Of `read_scans`, both halves.
        floor: Attack success that a backdoored model must have to be judged.
        alpha: Share of clean models that may be called backdoored.

    Raises:
        ValueError: No scans, a rate out of range, no detector with five clean models in the
            calibration half, or one with different settings or numbers of images in the halves.
    """
    check_rates(floor=floor, alpha=alpha)
    if not scans:
        raise ValueError("expected at least one scan of a population, got none")
    calibrations: dict[tuple[str, int], Calibration] = {}
    judged: dict[str, tuple[Judged, ...]] = {}
    left_out: dict[tuple[str, int], int] = {}
    for detector in house_first(s.values["defence"] for s in scans):
        mine = [s for s in scans if s.values["defence"] == detector]
        for classes in sorted({_classes(s) for s in mine}):
            same = [s for s in mine if _classes(s) == classes]
            if (count := len(_clean_models(same))) < LEAST:
                left_out[detector, classes] = count
                continue
            calibration = calibrations[detector, classes] = calibrate(same)
            test = [s for s in same if s.values["half"] == "test"]
            now = tuple(_judge(scan, calibration, alpha) for scan in test)
            judged[detector] = (*judged.get(detector, ()), *now)
    if not judged:
        raise _too_few(max(left_out.values()))
    if judged.keys() >= set(CALIBRATED):
        ours = {detector: judged[detector] for detector in CALIBRATED}
        shares = [
            [
                _judge(j.scan, calibrations[detector, _classes(j.scan)], alpha / len(CALIBRATED))
                for j in group
            ]
            for detector, group in ours.items()
        ]
        judged = {**ours, TOGETHER: _together(shares), **judged}  # the others come after
    rows = [
        row
        for detector, group in judged.items()
        for attack in (CLEAN, *TABLE)
        for row in count_rows(detector, attack, group, floor)
    ]
    return Population(calibrations, judged, tuple(rows), left_out)


def house_first(detectors: Iterable[str]) -> list[str]:
    """Different names of detectors, those of this house before all others."""
    return sorted(set(detectors), key=lambda name: (name not in CALIBRATED, name))


def _too_few(count: int) -> ValueError:
    return ValueError(f"expected at least {LEAST} clean models to calibrate on, got {count}")


def _classes(scan: Scan) -> int:
    return int(scan.values["subject"]["classes"])


def _may_teach(scan: Scan) -> bool:
    return scan.attack == CLEAN and scan.values["half"] == "calibration"


def _clean_models(scans: Sequence[Scan]) -> list[CleanModel]:
    """What one detector can be calibrated on, from scans that were all made alike."""
    settings = [scan.values["settings"]["settings"] for scan in scans]
    if any(other["detector"] != settings[0]["detector"] for other in settings):
        raise ValueError("expected one set of detector settings in both halves, got more")
    images = sorted({one["images"] for one in settings})
    if len(images) > 1:
        got = ", ".join(map(str, images))
        raise ValueError(f"expected one number of the defender's images in both halves, got {got}")
    return [model for s in scans if _may_teach(s) and (model := _clean(s)) is not None]


def _clean(scan: Scan) -> CleanModel | None:
    values = scan.values
    return clean_model(
        _column(scan, "score"),
        _column(scan, "success_rate"),
        floor=values["floor"],
        subject=ModelInfo(**values["subject"]),
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
        subject=ModelInfo(**scan.values["subject"]),
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
    """Several detectors on the same models, each at its share of the error rate (Bonferroni).

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


__all__ = [
    "LEAST",
    "TOGETHER",
    "Population",
    "calibrate",
    "house_first",
    "read_scans",
    "summarise",
]
