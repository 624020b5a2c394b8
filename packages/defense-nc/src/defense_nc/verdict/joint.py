"""Several detectors' scans of one model, judged together.

What one detector sees faintly another may see too, and two faint signs of the same label are worth
more than one: the p-values of a label are multiplied. How small products become by chance, clean
models tell that all of the detectors have scanned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from scipy.special import gammaincc
from torch import Tensor

from defense_nc.config import check_rule
from defense_nc.verdict.abstention import NOT_LOOKED_FOR, starved_search, too_many
from defense_nc.verdict.calibrate import priors_of_others
from defense_nc.verdict.calibration import Calibration, CleanModel, any_of
from defense_nc.verdict.report import at_least
from defense_nc.verdict.scan_report import ScanReport, Verdict
from defense_nc.verdict.shrinkage import Prior, log_scores
from defense_nc.verdict.tail_fit import SMALLEST, Tail, fit_tail, tail_p_values

# What a joint null takes at least: clean models, and labels of them.
_MODELS, _LABELS = 5, 20


class JointCalibration(NamedTuple):
    """The null distribution of several detectors' evidence, added up."""

    calibrations: tuple[Calibration, ...]
    tail: Tail  # of the labels of the clean models that all of them hold

    def p_values(self, reports: Sequence[ScanReport]) -> Tensor:
        """Of every label ``(K,)``, multiplicity included; a report for each calibration."""
        evidence = [
            _of_report(report, calibration)
            for report, calibration in zip(reports, self.calibrations, strict=True)
        ]
        return any_of(tail_p_values(_nominal(evidence), self.tail))


class JointReport(NamedTuple):
    """What scans of one model say together."""

    verdict: Verdict
    p_values: tuple[float, ...]  # by label, multiplicity included
    suspected: tuple[int, ...]
    reason: str

    @property
    def p_value(self) -> float:
        """The smallest of the labels."""
        return self.p_values[self.nearest]

    @property
    def nearest(self) -> int:
        """The label that stands out most."""
        return min(range(len(self.p_values)), key=self.p_values.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "verdict": self.verdict.value,
            "p_value": self.p_value,
            "p_values": list(self.p_values),
            "suspected": list(self.suspected),
            "reason": self.reason,
        }


@lru_cache(maxsize=64)
def fit_joint(*calibrations: Calibration) -> JointCalibration | None:
    """The joint null of detectors, from the clean models that all were calibrated on.

    Models are the same if their names are. Each is judged by the others, as a new one is. None
    where fewer than five models, or twenty labels, are shared.

    Source: Fisher, Statistical Methods for Research Workers (1932), section 21.1: the product of
        p-values. Its null from clean models is ours: detectors of one model are not independent.
    """
    by_name = [
        {model.name: (model, prior) for model, prior in _with_priors(calibration)}
        for calibration in calibrations
    ]
    names = [name for name in by_name[0] if all(name in models for models in by_name)]
    nominal = [
        _nominal(
            [
                _of_model(*models[name], calibration)
                for models, calibration in zip(by_name, calibrations, strict=True)
            ]
        )
        for name in names
    ]
    if len(names) < _MODELS or sum(map(len, nominal)) < _LABELS:
        return None
    return JointCalibration(calibrations, fit_tail(torch.cat(nominal)))


def panels(reports: Mapping[str, ScanReport]) -> list[tuple[str, ...]]:
    """The names of reports in groups that can be judged together, each in the first that it fits.

    A report of a model outside its calibration, or without one, is in none.
    """
    groups: list[tuple[str, ...]] = []
    for name, report in reports.items():
        if report.calibration is None or not report.calibrated:
            continue
        for i, group in enumerate(groups):
            members = [reports[one].calibration for one in (*group, name)]
            if fit_joint(*(c for c in members if c is not None)) is not None:
                groups[i] = (*group, name)
                break
        else:
            groups.append((name,))
    return groups


def judge_together(reports: Mapping[str, ScanReport], *, alpha: float) -> JointReport:
    """One verdict from several scans of one model, that no scan decides alone.

    Args:
        reports: By the detector's title; two or more, all calibrated, as in one of `panels`.
        alpha: In (0, 1): share of clean models that they may accuse together.

    Returns:
        backdoored: a label is suspected. inconclusive: none is, and one of the scans abstains, or
        so many are that the others give no reference; not-scanned: one had no gradients to follow.
        clean: none of these.

    Raises:
        ValueError: Fewer reports, one without a calibration, too few clean models in all, or alpha
            out of range.
    """
    check_rule(alpha)
    every = list(reports.values())
    calibrations = [r.calibration for r in every if r.calibrated and r.calibration is not None]
    if len(every) < 2 or len(calibrations) < len(every):
        got = f"{len(every)}, {len(calibrations)} of them calibrated"
        raise ValueError(f"expected two or more calibrated reports, got {got}")
    joint = fit_joint(*calibrations)
    if joint is None:
        raise ValueError("expected detectors that were calibrated on the same clean models")
    values = joint.p_values(every)
    suspects: tuple[int, ...] = tuple((values <= alpha).nonzero().flatten().tolist())
    comparable = torch.tensor([[label.converged for label in r.labels] for r in every]).any(0)
    starvation = [
        f"{title}: {why}"
        for title, report in reports.items()
        if (why := starved_search(report.starved, suspects))
    ]
    limit = too_many(suspects, int(comparable.sum()))
    unsure = {
        title: report.reason
        for title, report in reports.items()
        if report.verdict in (Verdict.INCONCLUSIVE, Verdict.NOT_SCANNED)
    }
    if starvation:
        verdict, suspects, reason = Verdict.NOT_SCANNED, (), " ".join(starvation)
    elif limit:
        verdict, reason = Verdict.INCONCLUSIVE, limit
    elif suspects:
        verdict, reason = Verdict.BACKDOORED, _accusation(suspects, values, reports)
    elif unsure:
        verdict = Verdict.INCONCLUSIVE
        reason = " ".join(f"{title}: {why}" for title, why in unsure.items())
    else:
        verdict, reason = Verdict.CLEAN, _nothing(values, reports)
    return JointReport(verdict, tuple(values.tolist()), suspects, reason)


def _with_priors(calibration: Calibration) -> list[tuple[CleanModel, Prior]]:
    """The models whose labels are known, each with the spread of the others."""
    pairs = zip(calibration.models, priors_of_others(calibration.models), strict=True)
    return [(model, prior) for model, prior in pairs if model.labels is not None]


def _of_model(model: CleanModel, prior: Prior, calibration: Calibration) -> Tensor:
    """A clean model's evidence for its labels ``(K,)``."""
    logs = torch.tensor(model.log_scores, dtype=torch.float64)
    p_values = calibration.label_p_values(logs, prior)
    return _spread(p_values, model.labels or (), model.idle, model.subject.classes)


def _of_report(report: ScanReport, calibration: Calibration) -> Tensor:
    """A scan's evidence for its labels ``(K,)``."""
    rates = torch.tensor([label.success_rate for label in report.labels], dtype=torch.float64)
    comparable = [label.label for label in report.labels if label.converged]
    idle = (~at_least(rates, report.works)).nonzero().flatten().tolist()
    if len(comparable) < 2:
        return torch.zeros_like(rates)
    scores = torch.tensor([report.labels[k].score for k in comparable], dtype=torch.float64)
    prior = calibration.prior(report.subject)
    p_values = calibration.label_p_values(log_scores(scores), prior)
    return _spread(p_values, comparable, idle, len(rates))


def _spread(p_values: Tensor, labels: Sequence[int], idle: Sequence[int], count: int) -> Tensor:
    """Minus the logarithms of some labels' p-values among those of all, 0 for the others.

    A detector that has nothing to say of a label speaks for it being clean: counting only those
    that do say something accuses more clean models.
    """
    evidence = torch.zeros(count, dtype=torch.float64)
    evidence[list(labels)] = -p_values.clamp(min=SMALLEST).log()
    evidence[list(idle)] = 0.0
    return evidence


def _nominal(evidence: Sequence[Tensor]) -> Tensor:
    """The p-values of the sums ``(K,)``, if detectors were independent (chi-squared)."""
    total = torch.stack(list(evidence)).sum(0)
    return torch.from_numpy(gammaincc(len(evidence), total.numpy()))


def _accusation(suspects: Sequence[int], values: Tensor, reports: Mapping[str, ScanReport]) -> str:
    """Why these labels are suspected."""
    parts = (f"label {k} ({_figures(k, values, reports)})" for k in suspects)
    return f"Standing out from the other labels: {' and '.join(parts)}."


def _nothing(values: Tensor, reports: Mapping[str, ScanReport]) -> str:
    """What stands out most where nothing does."""
    lowest = int(values.argmin())
    figures = _figures(lowest, values, reports)
    return f"No label stands out: the nearest is label {lowest} ({figures}). {NOT_LOOKED_FOR}."


def _figures(label: int, values: Tensor, reports: Mapping[str, ScanReport]) -> str:
    alone = (f"{title} {report.labels[label].p_value:.2g}" for title, report in reports.items())
    return f"p = {float(values[label]):.2g}; alone: {', '.join(alone)}"
