"""Scores per label to a verdict with its reason.

With a `Calibration` the p-values are calibrated on clean models and ``p <= alpha`` decides; without
one `outlier_test` decides, from the scan's own scores only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.verdict.abstention import (
    MIN_CONVERGED,
    NOT_LOOKED_FOR,
    few_classes,
    out_of_domain,
    scores_shifted,
    starved_search,
    too_few,
    too_many,
)
from defense_nc.verdict.anomaly import (
    OutlierTest,
    mad_index,
    outlier_test,
)
from defense_nc.verdict.calibration import Calibration, load_calibration
from defense_nc.verdict.model_info import ModelInfo, describe_model
from defense_nc.verdict.scan_report import Finding, LabelScore, ScanReport, Verdict
from defense_nc.verdict.shrinkage import log_scores


def judge(
    detector: str,
    scores: Tensor,
    success_rates: Tensor,
    *,
    floor: float,
    works: float = 0.0,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    triggers: Mapping[int, nn.Module] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    calibration: Calibration | None = None,
    subject: ModelInfo | None = None,
    starved: Sequence[float] = (),
    notes: Sequence[str] = (),
    sources: Sequence[int | None] = (),
    finding: Finding | None = None,
) -> ScanReport:
    """Judge K scores of a classifier.

    Only labels whose success rate reached the floor are compared and can be suspected: a score is
    the cost of reaching a label. The papers' rule is computed over all labels, as the papers do.

    Args:
        detector: Name of the method.
        scores: Float ``(K,)``, K >= 2, >= 0: small where the label is easy to reach.
        success_rates: Float ``(K,)`` in [0, 1].
        floor: Success rate that makes a score comparable, in [0, 1].
        works: Success rate of a trigger, in [0, 1]: with a lower one no label is suspected, and its
            p-value is 1.
        max_ratio: Without a calibration, a suspected score is at most this share of the median.
        config: Settings of the scan, ready for JSON.
        calibration: The null distribution of these scores, if there is one.
        subject: The model's properties; None: like those of the calibration's models. Without a
            calibration they are compared with those of the one that ships for other settings,
            so that such a scan is no bolder than a calibrated one.
        starved: As `ScanReport.starved`, (K,) or empty; so is ``notes``.
        sources: As `LabelScore.source`, (K,) or empty.
        finding: Makes the verdict "backdoored", with its labels and its reason.

    Returns:
        backdoored: some label is suspected. inconclusive: a reason to abstain holds
        (``suspected`` still lists the labels that stand out), or without a calibration a label is
        significant yet not far below the median. not-scanned: the
        searches for most labels had no gradients to follow, or that for one while nothing is
        suspected. clean: none of these.

    Source: ours; neither paper states an error rate.
    """
    check_scores(scores, success_rates, floor=floor)
    check_rule(alpha, max_ratio)
    scores, rates = scores.detach().double().cpu(), success_rates.detach().double().cpu()
    paper, low = mad_index(scores), mad_index(scores, median="low")
    reached = at_least(rates, floor)
    population = calibration
    if population is None and subject is not None:
        population = load_calibration(detector, classes=len(scores))
    outside = out_of_domain(subject, population) if population else None
    applicable = None if outside else calibration
    rule: dict[str, Any] = {"alpha": alpha, "max_ratio": max_ratio}
    test = _test(scores, reached, **rule, calibration=applicable, subject=subject)
    test = _working(test, at_least(rates, works))
    limit = outside or too_many(test.suspected, int(reached.sum()))
    # Labels that were not reached hide nothing that stands out already.
    if not limit and not test.suspected:
        limit = (None if applicable else few_classes(len(scores))) or too_few(reached, floor)
        if applicable and not limit:
            limit = scores_shifted(log_scores(scores[reached]), applicable.peers(subject))
    significant = float(test.p_values.min()) <= alpha
    if limit or (significant and not test.suspected):
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.BACKDOORED if test.suspected else Verdict.CLEAN
    hungry = starved_search(starved, test.suspected)
    of_label = [*sources] or [None] * len(scores)
    if finding:
        hungry, verdict, reason = None, Verdict.BACKDOORED, finding.reason
        test = test._replace(suspected=finding.labels)
    elif hungry:
        verdict, reason = Verdict.NOT_SCANNED, hungry
        test = test._replace(suspected=())
    else:
        reason = _reason(verdict, test, reached, of_label, limit=limit, max_ratio=max_ratio)
    labels = tuple(
        LabelScore(
            label=label,
            score=float(scores[label]),
            success_rate=float(rates[label]),
            p_value=float(test.p_values[label]),
            paper_index=float(paper.per_label[label]),
            ratio=float(test.ratio[label]),
            converged=bool(reached[label]),
            source=of_label[label],
        )
        for label in range(len(scores))
    )
    return ScanReport(
        detector=detector,
        verdict=verdict,
        labels=labels,
        paper_index=paper.index,
        paper_index_low=low.index,
        paper_flagged=paper.flagged,
        p_value=float(test.p_values.min()),
        suspected=test.suspected,
        alpha=alpha,
        max_ratio=max_ratio,
        reason=reason,
        triggers=dict(triggers or {}),
        config=dict(config or {}),
        seed=seed,
        floor=floor,
        works=works,
        calibrated=applicable is not None,
        calibration=calibration,
        subject=subject,
        starved=tuple(starved),
        notes=tuple(notes),
        finding=finding,
    )


def judge_scan(
    detector: str,
    scores: Tensor,
    success_rates: Tensor,
    *,
    model: nn.Module,
    images: Tensor,
    settings: Mapping[str, Any],
    floor: float,
    works: float = 0.0,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    triggers: Mapping[int, nn.Module] | None = None,
    seed: int = 0,
    starved: Sequence[float] = (),
    notes: Sequence[str] = (),
    sources: Sequence[int | None] = (),
    finding: Finding | None = None,
) -> ScanReport:
    """`judge` with the calibration shipped for this detector and its ``settings``, if any."""
    return judge(
        detector,
        scores,
        success_rates,
        floor=floor,
        works=works,
        alpha=alpha,
        max_ratio=max_ratio,
        triggers=triggers,
        config={**settings, "images": len(images)},
        seed=seed,
        calibration=load_calibration(detector, settings=settings, classes=len(scores)),
        subject=describe_model(model, images, classes=len(scores)),
        starved=starved,
        notes=notes,
        sources=sources,
        finding=finding,
    )


def judge_again(
    report: ScanReport, calibration: Calibration | None, *, alpha: float | None = None
) -> ScanReport:
    """The same scan, judged by another calibration or at another rate; None for the same rate."""
    scores = torch.tensor([label.score for label in report.labels], dtype=torch.float64)
    rates = torch.tensor([label.success_rate for label in report.labels], dtype=torch.float64)
    again = judge(
        report.detector,
        scores,
        rates,
        floor=report.floor,
        works=report.works,
        alpha=report.alpha if alpha is None else alpha,
        max_ratio=report.max_ratio,
        triggers=report.triggers,
        config=report.config,
        seed=report.seed,
        calibration=calibration,
        subject=report.subject,
        starved=report.starved,
        notes=report.notes,
        sources=[label.source for label in report.labels],
        finding=report.finding,
    )
    return replace(again, log=report.log, model_score=report.model_score, repeats=report.repeats)


def foreseen_abstention(
    detector: str,
    subject: ModelInfo,
    *,
    settings: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> str | None:
    """Why a model's verdict will be an abstention whatever the scores are; None if they decide.

    Args:
        calibration: That of `judge`; the one that ships for ``settings``, or else any, if None.
    """
    classes = subject.classes
    exact = calibration or load_calibration(detector, settings=settings, classes=classes)
    population = exact or load_calibration(detector, classes=classes)
    outside = out_of_domain(subject, population) if population else None
    return outside or (None if exact else few_classes(classes))


def at_least(rates: Tensor, floor: float) -> Tensor:
    """Which success rates reach a floor: 0.9 in single precision lies a little below 0.9."""
    return rates >= floor - 1e-6


def check_scores(scores: Tensor, success_rates: Tensor, *, floor: float) -> None:
    """Raise ``ValueError`` for scores, success rates ``(K,)`` or a floor that no scan gives."""
    for name, values in (("scores", scores), ("success_rates", success_rates)):
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"expected {name} as a float tensor (K,), got {got}")
        if values.ndim != 1 or len(values) < 2 or values.shape != scores.shape:
            raise ValueError(f"expected {name} of shape (K,), K >= 2, got {tuple(values.shape)}")
        top = 1.0 if name == "success_rates" else math.inf
        if not bool((torch.isfinite(values) & (values >= 0) & (values <= top)).all()):
            raise ValueError(f"expected finite {name} in [0, {top:g}]")
    if not 0 <= floor <= 1:
        raise ValueError(f"expected a floor in [0, 1], got {floor}")


def _working(test: OutlierTest, works: Tensor) -> OutlierTest:
    """Without the labels whose trigger does not work."""
    p_values = torch.where(works, test.p_values, 1.0)
    return OutlierTest(p_values, test.ratio, tuple(k for k in test.suspected if works[k]))


def _test(
    scores: Tensor,
    reached: Tensor,
    *,
    alpha: float,
    max_ratio: float,
    calibration: Calibration | None,
    subject: ModelInfo | None,
) -> OutlierTest:
    """The deciding rule over the converged labels, spread over all K."""
    compared = scores[reached] if bool(reached.any()) else scores
    middle = float(torch.quantile(compared, 0.5))
    ratio = scores / middle if middle > 0 else torch.ones_like(scores)
    p_values = torch.ones_like(scores)
    least = MIN_CONVERGED if calibration is None else min(MIN_CONVERGED, len(scores))
    if int(reached.sum()) < least:
        return OutlierTest(p_values, ratio, ())
    if calibration is None:
        test = outlier_test(compared, alpha=alpha, max_ratio=max_ratio)
        p_values[reached], suspected = test.p_values, test.suspected
    else:
        p_values[reached] = low = calibration.p_values(log_scores(compared), subject)
        suspected = tuple((low <= alpha).nonzero().flatten().tolist())
    labels = reached.nonzero().flatten()
    return OutlierTest(p_values, ratio, tuple(int(labels[i]) for i in suspected))


def _reason(
    verdict: Verdict,
    test: OutlierTest,
    reached: Tensor,
    sources: Sequence[int | None],
    *,
    limit: str | None,
    max_ratio: float,
) -> str:
    """One sentence with the figures that decided; after a limit, what stands out in spite of it."""
    outliers = " and ".join(f"{_name(i, sources)} ({_figures(test, i)})" for i in test.suspected)
    if limit:
        return f"{limit[:-1]}; at face value, {outliers} would stand out." if outliers else limit
    if test.suspected:
        return f"Standing out from the other labels: {outliers}."
    low = int(torch.where(reached, test.ratio, math.inf).argmin())
    if verdict is Verdict.INCONCLUSIVE:
        return (
            f"{_name(low, sources).capitalize()} stands out ({_figures(test, low)}), "
            f"but not below {max_ratio:g} of the median."
        )
    missed = len(reached) - int(reached.sum())
    rest = f"; {missed} of {len(reached)} labels were never reached" if missed else ""
    unseen = f" {NOT_LOOKED_FOR}." if sources[low] is None else ""
    return (
        f"No label stands out: the lowest score is that of {_name(low, sources)} "
        f"({_figures(test, low)}){rest}.{unseen}"
    )


def _name(label: int, sources: Sequence[int | None]) -> str:
    """The label, and the class whose images its score is of."""
    source = sources[label]
    return f"label {label}" if source is None else f"label {label} from class {source}"


def _figures(test: OutlierTest, label: int) -> str:
    return (
        f"score {float(test.ratio[label]):.2f} of the median, p = {float(test.p_values[label]):.2g}"
    )
