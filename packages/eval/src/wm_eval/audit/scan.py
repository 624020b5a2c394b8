"""One verdict on one model: both defences look, and their answers become one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from defense_nc import Detector, ScanReport, Verdict
from wm_eval.audit.budget import OutOfTime, budget
from wm_eval.audit.checks import BATCH, Checked
from wm_eval.audit.images import CleanImages
from wm_eval.detectors import detector
from wm_eval.titles import CALIBRATED, detector_title


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit says of a model.

    Args:
        verdict: The one answer.
        reason: Why, in a sentence.
        reports: By detector: its report.
        failures: By detector: why it gave none.
        alpha: Share of clean models that may be called backdoored by all detectors together.
    """

    verdict: Verdict
    reason: str
    reports: Mapping[str, ScanReport]
    failures: Mapping[str, str]
    alpha: float
    suspected: tuple[int, ...] = field(default=())

    def to_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {
            "verdict": self.verdict,
            "exit_code": self.verdict.exit_code,
            "reason": self.reason,
            "suspected": list(self.suspected),
            "alpha": self.alpha,
            "detectors": {name: report.to_dict() for name, report in self.reports.items()},
            "failures": dict(self.failures),
        }


def audit(
    checked: Checked,
    clean: CleanImages,
    *,
    detectors: Sequence[str] = CALIBRATED,
    preset: str = "fast",
    alpha: float = 0.05,
    seed: int = 0,
    minutes: float | None = None,
    state: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Scan a checked model with every detector.

    Every detector may accuse ``alpha / len(detectors)`` of clean models, so that together they
    accuse at most ``alpha`` of them.

    Args:
        checked: The model, after `check_model`.
        clean: The defender's images.
        detectors: Names of `wm_eval.detectors.DETECTORS`.
        preset: Of every detector.
        alpha: In (0, 1).
        minutes: What is not finished by then is broken off; the same call goes on.
        state: A folder where scans keep what they have.
        say: Called with a line for every detector.

    Raises:
        ValueError: No detectors or two of one name, an unknown one, or numbers outside their range.
    """
    scanners = build_detectors(detectors, preset, alpha)
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    reports: dict[str, ScanReport] = {}
    failures: dict[str, str] = {}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for name, scanner in scanners.items():
        say(f"{detector_title(name)}: started")
        left = None if end is None else (end - time.monotonic()) / 60
        try:
            if left is not None and left <= 0:
                raise OutOfTime("not begun: the minutes were over")
            with budget(left):
                reports[name] = scanner.scan(
                    checked.module,
                    clean.images,
                    labels=checked.labels,
                    seed=seed,
                    progress=progress,
                    checkpoint=None if state is None else state / f"{name}.safetensors",
                )
        except (OutOfTime, ValueError, RuntimeError) as error:
            failures[name] = " ".join(str(error).split()) or type(error).__name__
    return conclude(reports, failures, alpha)


def build_detectors(names: Sequence[str], preset: str, alpha: float) -> dict[str, Detector]:
    """The detectors of a scan, which share its false-positive rate equally.

    Raises:
        ValueError: No detectors or two of one name, an unknown one, or alpha outside (0, 1).
    """
    if not names or len(set(names)) < len(names) or not 0 < alpha < 1:
        given = ", ".join(names) or "none"
        raise ValueError(f"expected detectors and alpha in (0, 1), got {given} and {alpha}")
    return {name: detector(name, preset, alpha=alpha / len(names)) for name in names}


def conclude(reports: Mapping[str, ScanReport], failures: Mapping[str, str], alpha: float) -> Audit:
    """One verdict from several reports: backdoored if one says so, clean if all say so."""
    verdicts = {name: report.verdict for name, report in reports.items()}
    guilty = [name for name, verdict in verdicts.items() if verdict is Verdict.BACKDOORED]
    unsure = [name for name, verdict in verdicts.items() if verdict is not Verdict.CLEAN]
    suspected = sorted({label for name in guilty for label in reports[name].suspected})
    if guilty:
        verdict = Verdict.BACKDOORED
        reason = " ".join(f"{detector_title(name)}: {reports[name].reason}" for name in guilty)
    elif not reports:
        verdict = Verdict.NOT_SCANNED
        reason = " ".join(f"{detector_title(name)}: {why}." for name, why in failures.items())
    elif unsure or failures:
        verdict = Verdict.INCONCLUSIVE
        said = {name: reports[name].reason for name in unsure} | dict(failures)
        reason = " ".join(f"{detector_title(name)}: {why}" for name, why in said.items())
    else:
        verdict = Verdict.CLEAN
        reason = "No detector found a label that is unusually easy to reach. Nothing found is not "
        reason += "proof that nothing is there."
    return Audit(verdict, reason, dict(reports), dict(failures), alpha, tuple(suspected))


def longest_minutes(checked: Checked, clean: CleanImages, num_classes: int) -> float:
    """Minutes that a scan by both house detectors takes at most, from a few passes timed now.

    Labels leave the searches early, so that most scans take a fraction of it.
    """
    images = clean.images[: BATCH // 2].clone().requires_grad_()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(checked.module(images).logsumexp(1).sum(), images)
        seconds.append((time.perf_counter() - start) / len(images))
    each = min(seconds)
    nc, reverse = detector("nc").settings, detector("reverse").settings
    passes = nc["steps"] * nc["batches"] * nc["batch_size"] * len(nc["starts"])
    passes += reverse["steps"] * reverse["batch_size"]
    return float(each * passes * num_classes / 60)


def reversed_triggers(audit: Audit) -> dict[int, nn.Module]:
    """For every suspected label, the reversed trigger of the detector that is surest of it."""
    best: dict[int, tuple[float, nn.Module]] = {}
    for report in audit.reports.values():
        for label in report.suspected:
            p_value = report.labels[label].p_value
            if label in report.triggers and (label not in best or p_value < best[label][0]):
                best[label] = (p_value, report.triggers[label])
    return {label: trigger for label, (_, trigger) in sorted(best.items())}


def all_triggers(audit: Audit) -> list[tuple[int, nn.Module]]:
    """For every suspected label, what any detector reversed that reaches it, and the label.

    A detector that accuses nobody may have found another way to the same label.
    """
    return [
        (label, report.triggers[label])
        for label in audit.suspected
        for report in audit.reports.values()
        if label in report.triggers
        and (label in report.suspected or report.labels[label].converged)
    ]
