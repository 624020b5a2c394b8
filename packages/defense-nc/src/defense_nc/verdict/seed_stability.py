"""Repeat a scan whose p-value is close to alpha with further seeds until the verdict is stable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from defense_nc.verdict.report import judge
from defense_nc.verdict.scan_report import ScanReport, Verdict


def scan_until_stable(
    scan: Callable[[int], ScanReport],
    *,
    seed: int = 0,
    max_repeats: int = 5,
    agree: int = 3,
    margin: float = 4.0,
) -> ScanReport:
    """Repeat a scan with further seeds until its verdict is stable, or call it inconclusive.

    One scan is enough where its p-value is far from alpha: at most ``alpha / margin``, or at least
    ``alpha * margin``. Otherwise scans are added, and judged together by `combine`, until the last
    ``agree`` of them and all together name the same labels.

    Args:
        scan: Seed -> report; nothing but the seed differs.
        seed: The first seed; further scans take the next numbers.

    Source: ours. A simulation in the tests shows that repeats do not raise the false alarm rate.
    """
    if seed < 0 or agree < 2 or max_repeats < agree or not margin >= 1:
        raise ValueError(
            f"expected seed >= 0, agree >= 2, max_repeats >= agree and margin >= 1, "
            f"got {seed}, {agree}, {max_repeats}, {margin}"
        )
    reports = [scan(seed)]
    if _settled(reports[0], margin):
        return reports[0]
    joint = reports[0]
    while len(reports) < max_repeats:
        reports.append(scan(seed + len(reports)))
        joint = combine(reports)
        recent = {_answer(report) for report in reports[-agree:]}
        if len(reports) >= agree and recent == {_answer(joint)}:
            return joint
    tally = Counter(report.verdict.value for report in reports)
    counts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(tally.items()))
    return replace(
        joint,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"The verdict flips between {len(reports)} scans ({counts}). "
        f"Together: {joint.reason}",
    )


def combine(reports: Sequence[ScanReport]) -> ScanReport:
    """One report on several scans of the same model, judged by each label's median log score.

    A label counts as reached if half of the scans reached it; score and success rate are the
    medians of those, and the trigger is that of the scan whose score is nearest. A finding counts
    if half of the scans have one.

    Raises:
        ValueError: No reports, or reports that differ in more than seed and scores.
    """
    if not reports:
        raise ValueError("expected at least one report, got none")
    first = reports[0]
    for report in reports[1:]:
        same = (
            (report.detector, report.floor, report.alpha, report.max_ratio, report.subject)
            == (first.detector, first.floor, first.alpha, first.max_ratio, first.subject)
            and report.config == first.config
            and report.calibration == first.calibration
            and len(report.labels) == len(first.labels)
        )
        if not same:
            raise ValueError("expected reports that differ in seed and scores only")
    scores = torch.tensor([[label.score for label in r.labels] for r in reports]).double()
    rates = torch.tensor([[label.success_rate for label in r.labels] for r in reports]).double()
    reached = torch.tensor([[label.converged for label in r.labels] for r in reports])
    medians = [_medians(*column) for column in zip(scores.T, rates.T, reached.T, strict=True)]
    triggers, sources = {}, []
    for label, (score, _) in enumerate(medians):
        nearest = reports[int((scores[:, label] - score).abs().argmin())]
        sources.append(nearest.labels[label].source)
        if label in nearest.triggers:
            triggers[label] = nearest.triggers[label]
    findings = [report.finding for report in reports if report.finding is not None]
    joint = judge(
        first.detector,
        torch.tensor([score for score, _ in medians]).double(),
        torch.tensor([rate for _, rate in medians]).double(),
        floor=first.floor,
        works=first.works,
        alpha=first.alpha,
        max_ratio=first.max_ratio,
        triggers=triggers,
        config=first.config,
        seed=first.seed,
        calibration=first.calibration,
        subject=first.subject,
        starved=torch.tensor([report.starved for report in reports]).mean(0).tolist(),
        notes=first.notes,
        sources=sources,
        finding=findings[0] if 2 * len(findings) >= len(reports) else None,
    )
    return replace(joint, repeats=sum(report.repeats for report in reports))


def _medians(scores: Tensor, rates: Tensor, reached: Tensor) -> tuple[float, float]:
    """Median log score (as a score) and success rate of one label."""
    counted = reached if 2 * int(reached.sum()) >= len(reached) else ~reached
    # The logarithm of zero is not finite; the smallest number stands in for it and becomes zero.
    logs = scores[counted].clamp(min=1e-300).log()
    middle = float(torch.quantile(logs, 0.5).exp())
    return middle if middle > 2e-300 else 0.0, float(torch.quantile(rates[counted], 0.5))


def _settled(report: ScanReport, margin: float) -> bool:
    """Whether another scan is not worth its time."""
    far = report.p_value <= report.alpha / margin or report.p_value >= report.alpha * margin
    # A model outside the calibrated range stays outside, and what was found needs no second scan.
    return (
        far
        or report.finding is not None
        or (report.calibration is not None and not report.calibrated)
    )


def _answer(report: ScanReport) -> tuple[Verdict, tuple[int, ...]]:
    return report.verdict, report.suspected
