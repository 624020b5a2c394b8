"""A null distribution from the audits of clean models of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from defense_nc import (
    Calibration,
    CleanModel,
    ModelInfo,
    Verdict,
    clean_model,
    fit_calibration,
    judge,
)
from defense_nc.verdict import find_calibration, read_calibrations
from wm_eval.detectors import DETECTORS, detector
from wm_eval.population import MIN_MODELS


class Fitted(NamedTuple):
    """The calibration of one detector.

    Args:
        name: Of the detector, of `wm_eval.detectors.DETECTORS`.
        calibration: Its null distribution.
        left_out: Files whose model reached too few labels to be compared.
        accused: Files whose model the others would call backdoored, at a rate of 0.05; None if
            these are too few to say so.
    """

    name: str
    calibration: Calibration
    left_out: tuple[str, ...]
    accused: tuple[str, ...] | None


def fit_reports(files: Sequence[Path], *, preset: str = "fast") -> list[Fitted]:
    """Calibrations of the detectors that scanned all of these clean models.

    Args:
        files: JSON that ``wm-eval scan`` wrote, one for each model.
        preset: Of the scans.

    Raises:
        ValueError: Another file, a model twice, no detector that scanned all with this preset, or
            one with fewer than five models.
    """
    reports: dict[Path, Mapping[str, Any]] = {}
    by_model: dict[str, Path] = {}
    for path in files:
        report = _read(path)
        if (first := by_model.get(report["sha256"])) is not None:
            raise ValueError(f"expected every model once, got it in {first} and {path}")
        reports[path] = report
        by_model[report["sha256"]] = path
    scanned = [set(report["detectors"]) for report in reports.values()]
    names = [name for name in DETECTORS if all(name in some for some in scanned)]
    if not names:
        raise ValueError("expected reports of the same detectors, got none that is in all of them")
    return [_fit(name, reports, preset) for name in names]


def load_own(path: Path, preset: str) -> dict[str, Calibration]:
    """The calibrations in a file, by detector, for the scans of a preset.

    Raises:
        ValueError: Not such a file, or none of its calibrations is for this preset.
    """
    try:
        calibrations = read_calibrations(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected calibrations in {path}: {error}") from None
    by_detector = {}
    for name in DETECTORS:
        scanner = detector(name, preset)
        own = find_calibration(calibrations, scanner.name, settings=scanner.settings)
        if own is not None:
            by_detector[name] = own
    if not by_detector:
        raise ValueError(f"expected calibrations of the preset {preset} in {path}, found none")
    return by_detector


def _read(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] == "wm-audit-1" and report["detectors"] and report["sha256"]:
            return dict(report)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"expected what wm-eval scan --json writes of a scanned model, got {path}")


def _fit(name: str, reports: Mapping[Path, Mapping[str, Any]], preset: str) -> Fitted:
    scanner = detector(name, preset)
    settings: dict[str, Any] = json.loads(json.dumps(dict(scanner.settings)))
    works = float(settings.get("works", 0.0))
    models: dict[str, CleanModel] = {}
    scores: dict[str, tuple[Tensor, Tensor]] = {}
    left_out = []
    for path, report in reports.items():
        values = report["detectors"][name]
        differing = [key for key, value in settings.items() if values["config"].get(key) != value]
        if differing:
            why = f"{path} was scanned with another {differing[0]}"
            raise ValueError(f"expected scans of {name} with the preset {preset}: {why}")
        score, rate = (
            torch.tensor([label[key] for label in values["labels"]], dtype=torch.float64)
            for key in ("score", "success_rate")
        )
        model = clean_model(
            score,
            rate,
            floor=values["floor"],
            subject=ModelInfo(**values["subject"]),
            dataset="",
            arch=str(report["model"]["arch"]),
            name=report["file"],
            works=works,
        )
        if model is None:
            left_out.append(str(path))
        else:
            models[str(path)], scores[str(path)] = model, (score, rate)
    if len(models) < MIN_MODELS:
        models_of = f"clean models that {name} can compare"
        raise ValueError(f"expected at least {MIN_MODELS} {models_of}, got {len(models)}")
    about: dict[str, Any] = {"detector": scanner.name, "preset": preset, "settings": settings}
    calibration = fit_calibration(list(models.values()), **about)

    def is_accused(path: str) -> bool:
        others = [model for one, model in models.items() if one != path]
        by_others = judge(
            scanner.name,
            *scores[path],
            floor=values["floor"],
            works=works,
            calibration=fit_calibration(others, **about),
            subject=models[path].subject,
        )
        return by_others.verdict is Verdict.BACKDOORED

    accused = tuple(filter(is_accused, models)) if len(models) > MIN_MODELS else None
    return Fitted(name, calibration, tuple(left_out), accused)
