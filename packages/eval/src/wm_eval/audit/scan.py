"""Several detectors look at one model."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from defense_nc import Calibration, Detector, ScanReport, Verdict
from defense_nc.verdict import describe_model, foreseen_abstention, judge_again
from wm_eval.audit.budget import Budget, OutOfTime
from wm_eval.audit.checks import Checked
from wm_eval.audit.conclusion import Audit, conclude
from wm_eval.audit.images import CleanImages
from wm_eval.audit.settings import AUTO, check_detectors
from wm_eval.detectors import DETECTORS, detector
from wm_eval.titles import AUDIT, detector_title
from wm_inject.core.errors import error_line
from wm_inject.core.resume import fingerprint
from wm_victim.inference import images_a_pass
from wm_victim.reading import BATCH

_MOST_PASSES = 100_000  # without a verdict: an hour at 224 pixels, which is as long as one may wait


def audit(
    checked: Checked,
    clean: CleanImages,
    *,
    detectors: Sequence[str],
    preset: str = "fast",
    alpha: float = 0.05,
    seed: int = 0,
    own: Mapping[str, Calibration] = MappingProxyType({}),
    budget: Budget | None = None,
    state: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Scan a checked model with every detector.

    Detectors that were calibrated on the same clean models are judged together; others may accuse
    ``alpha / len(detectors)`` of clean models each, so that all accuse at most ``alpha`` of them.

    Args:
        checked: The model, after `check_model`.
        clean: The defender's images.
        detectors: Names of `wm_eval.detectors.DETECTORS`, as of `choose_detectors`.
        preset: Of every detector.
        alpha: In (0, 1).
        own: By detector: a calibration in place of the one that ships.
        budget: What is not finished by then is broken off, and the others give the verdict; with
            ``state``, the same call goes on.
        state: A folder where scans keep what they have, each in a file of its own: of any models,
            images and settings.
        say: Called with two lines for every detector: when it starts, and what it found.

    Raises:
        ValueError: As `check_detectors`.
    """
    scanners = build_detectors(detectors, preset, alpha)
    files = _state_files(state, scanners, checked, clean, seed)
    reports: dict[str, ScanReport] = {}
    failures: dict[str, str] = {}
    out_of_time: dict[str, str] = {}
    budget = budget or Budget()
    for name, scanner in scanners.items():
        say(f"{detector_title(name)}: started")
        try:
            with budget.enforced():
                report = scanner.scan(
                    checked.module,
                    clean.images,
                    labels=checked.labels,
                    seed=seed,
                    progress=progress,
                    device=device,
                    checkpoint=files.get(name),
                )
                reports[name] = judge_again(report, own[name]) if name in own else report
        except OutOfTime as error:
            out_of_time[name] = str(error)
        except Exception as error:  # whatever stops one detector, the others still look
            failures[name] = error_line(error)
        why = out_of_time.get(name) or failures.get(name)
        outcome = f"stopped: {why}" if why else _outcome(reports[name])
        say(f"{detector_title(name)}: {outcome}")
    return conclude(reports, failures, alpha, out_of_time=out_of_time)


def _outcome(report: ScanReport) -> str:
    """The label that stands out most, and whether the scan abstains."""
    abstains = report.verdict in (Verdict.INCONCLUSIVE, Verdict.NOT_SCANNED)
    verdict = f"{report.verdict}, " if abstains else ""
    return f"{verdict}nearest label {report.nearest}, p {report.p_value:.2g}"


def _state_files(
    state: Path | None,
    scanners: Mapping[str, Detector],
    checked: Checked,
    clean: CleanImages,
    seed: int,
) -> dict[str, Path]:
    """By detector, the file of its scan of this model with these images; none without a folder."""
    if state is None:
        return {}
    state.mkdir(parents=True, exist_ok=True)
    labels = () if checked.labels is None else (checked.labels,)
    data = fingerprint(*checked.module.state_dict().values(), clean.images, *labels)
    files = {}
    for name, scanner in scanners.items():
        scan = json.dumps([data, dict(scanner.settings), seed], sort_keys=True)
        digest = hashlib.sha256(scan.encode()).hexdigest()[:16]
        files[name] = state / f"{name}-{digest}.safetensors"
    return files


def build_detectors(names: Sequence[str], preset: str, alpha: float) -> dict[str, Detector]:
    """The detectors of a scan, which share its false-positive rate equally.

    Raises:
        ValueError: As `check_detectors`.
    """
    check_detectors(names, preset, alpha)
    return {name: detector(name, preset, alpha=alpha / len(names)) for name in names}


def choose_detectors(
    checked: Checked,
    clean: CleanImages,
    num_classes: int,
    *,
    wanted: Sequence[str] = AUTO,
    preset: str = "fast",
    own: Mapping[str, Calibration] = MappingProxyType({}),
) -> tuple[str, ...]:
    """The detectors of an audit: those that are wanted, or by default those that fit the model.

    The latter come cheapest first, so that what is broken off has answered as much as it can. They
    are the cheap ones (or those of ``own``) that can look at such a model and need not abstain.
    Where all would, the labels that stand out are still worth knowing: it is all that take 100,000
    passes at most, or else the cheapest.

    Raises:
        ValueError: A wanted detector that has no calibration in ``own``, if there is any; or none
            of ``own`` can look at the model.
    """
    if tuple(wanted) != AUTO:
        if missing := [name for name in wanted if own and name not in own]:
            listing = ", ".join(own)
            raise ValueError(f"expected a calibration of {missing[0]}, got those of {listing}")
        return tuple(wanted)
    offered = tuple(own or AUDIT)
    refusals = {name: _refusal(name, checked, clean) for name in offered}
    names = tuple(name for name in offered if refusals[name] is None)
    if not names:
        raise ValueError(next(filter(None, refusals.values())))
    certain = foreseen(checked, clean, num_classes, detectors=names, preset=preset, own=own)
    passes = {name: _passes(name, preset, num_classes, len(clean.images)) for name in names}
    names = tuple(sorted(names, key=passes.__getitem__))
    if answering := tuple(name for name in names if name not in certain):
        return answering
    most = max(_MOST_PASSES, min(passes.values()))
    return tuple(name for name in names if passes[name] <= most)


def foreseen(
    checked: Checked,
    clean: CleanImages,
    num_classes: int,
    *,
    detectors: Sequence[str],
    preset: str,
    own: Mapping[str, Calibration] = MappingProxyType({}),
) -> dict[str, str]:
    """By detector: why it will give no verdict on this model, whatever it finds; if it will not."""
    subject = describe_model(checked.module, clean.images, classes=num_classes)
    reasons = {}
    for name in detectors:
        scanner = detector(name, preset)
        reason = _refusal(name, checked, clean) or foreseen_abstention(
            scanner.name, subject, settings=scanner.settings, calibration=own.get(name)
        )
        if reason is not None:
            reasons[name] = reason
    return reasons


def longest_minutes(
    checked: Checked, clean: CleanImages, num_classes: int, *, detectors: Sequence[str], preset: str
) -> dict[str, float]:
    """By detector: minutes that its searches take at most, from a few passes timed now.

    What a search adds to the model's passes, as the generators, is not in them. Labels leave the
    searches of Neural Cleanse and of the generators early, so that most take a fraction.
    """
    most = images_a_pass(clean.images, clean.images.device, most=BATCH // 2)
    images = clean.images[:most].clone().requires_grad_()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(checked.module(images).logsumexp(1).sum(), images)
        seconds.append((time.perf_counter() - start) / len(images))
    minutes = min(seconds) / 60
    count = len(clean.images)
    return {name: minutes * _passes(name, preset, num_classes, count) for name in detectors}


def _refusal(name: str, checked: Checked, clean: CleanImages) -> str | None:
    return DETECTORS[name].refusal(checked.module, clean.images, checked.labels)


def _passes(name: str, preset: str, num_classes: int, images: int) -> float:
    return DETECTORS[name].passes(detector(name, preset).settings, num_classes, images)


class LabelTrigger(NamedTuple):
    """What a detector reversed.

    Args:
        label: Where the trigger leads.
        trigger: From images to triggered images.
        source: The class whose images it works on; all classes if None.
    """

    label: int
    trigger: nn.Module
    source: int | None = None


def reversed_triggers(audit: Audit, labels: Sequence[int] | None = None) -> dict[int, LabelTrigger]:
    """For every label, the reversed trigger of the detector that is surest of it.

    Args:
        labels: Those that stand out if None.
    """
    best: dict[int, tuple[float, LabelTrigger]] = {}
    for label, report in _reaching(audit, labels):
        p_value = report.labels[label].p_value
        if label not in best or p_value < best[label][0]:
            best[label] = (p_value, _label_trigger(report, label))
    return {label: trigger for label, (_, trigger) in sorted(best.items())}


def all_triggers(audit: Audit, labels: Sequence[int] | None = None) -> list[LabelTrigger]:
    """For every label, what any detector reversed that reaches it.

    A detector that accuses nobody may have found another way to the same label.

    Args:
        labels: Those that stand out if None.
    """
    return [_label_trigger(report, label) for label, report in _reaching(audit, labels)]


def _label_trigger(report: ScanReport, label: int) -> LabelTrigger:
    # A finding of pairs is one picture for the images of all classes.
    source = report.labels[label].source if report.finding is None else None
    return LabelTrigger(label, report.triggers[label], source)


def _reaching(audit: Audit, labels: Sequence[int] | None) -> Iterator[tuple[int, ScanReport]]:
    """The labels, each with the reports whose trigger of it reaches it."""
    for label in audit.outliers if labels is None else labels:
        for report in audit.reports.values():
            works = label in report.suspected or report.labels[label].converged
            if label in report.triggers and works:
                yield label, report
