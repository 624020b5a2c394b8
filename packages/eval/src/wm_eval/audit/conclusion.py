"""One verdict on one model from what several detectors said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from defense_nc import ScanReport, Verdict
from defense_nc.verdict import JointReport, judge_again, judge_together, panels
from wm_eval.titles import detector_title

AND = " + "  # between the titles of detectors that are judged together


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit says of a model.

    Args:
        verdict: The one answer.
        reason: Why, in a sentence.
        reports: By detector: its report.
        failures: By detector: why it gave none.
        alpha: Share of clean models that may be called backdoored by all detectors together.
        suspected: The labels that the verdict accuses.
        outliers: The labels that stand out at face value, whatever the verdict.
        together: By names: what detectors say that were judged together.
        unfinished: The detectors that the minutes were too few for, and why.
        p_value: The smallest of all labels and detectors, multiplicity included.
    """

    verdict: Verdict
    reason: str
    reports: Mapping[str, ScanReport]
    failures: Mapping[str, str]
    alpha: float
    suspected: tuple[int, ...] = ()
    outliers: tuple[int, ...] = ()
    together: Mapping[tuple[str, ...], JointReport] = field(default_factory=dict)
    unfinished: Mapping[str, str] = field(default_factory=dict)
    p_value: float = 1.0

    @property
    def targets(self) -> tuple[int, ...]:
        """What is to be cleaned: the accused labels, or else those that stand out."""
        return self.suspected or self.outliers

    def to_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {
            "verdict": self.verdict,
            "exit_code": self.verdict.exit_code,
            "reason": self.reason,
            "suspected": list(self.suspected),
            "outliers": list(self.outliers),
            "alpha": self.alpha,
            "p_value": self.p_value,
            "detectors": {name: report.to_dict() for name, report in self.reports.items()},
            "together": [
                {"detectors": list(names)} | joint.to_dict()
                for names, joint in self.together.items()
            ],
            "failures": dict(self.failures),
            "unfinished": dict(self.unfinished),
        }


def conclude(
    reports: Mapping[str, ScanReport],
    failures: Mapping[str, str],
    alpha: float,
    *,
    unfinished: Mapping[str, str] = MappingProxyType({}),
) -> Audit:
    """Backdoored if anything says so, clean if all say so.

    Detectors that were calibrated on the same clean models are judged together. Not scanned if
    nothing accuses and one had no gradients to follow. What was not finished in time has no say,
    and takes no share of the rate.

    Args:
        reports: By detector: its scan of the model.
        failures: By detector: why it gave none.
        alpha: In (0, 1): share of clean models that may be called backdoored.
        unfinished: By detector: that its time was over.
    """
    count = len(reports) + len(failures)
    said: dict[str, ScanReport | JointReport] = {}
    own, together, p_value = dict(reports), {}, 1.0
    groups = panels(reports)
    for names in groups:
        titles, rate = [detector_title(name) for name in names], alpha * len(names) / count
        opinion: ScanReport | JointReport
        if len(names) > 1:
            members = {detector_title(name): reports[name] for name in names}
            opinion = together[names] = judge_together(members, alpha=rate)
        else:
            report = reports[names[0]]
            opinion = own[names[0]] = judge_again(report, report.calibration, alpha=rate)
        said[AND.join(titles)] = opinion
        p_value = min(p_value, opinion.p_value * count / len(names))
    grouped = {name for names in groups for name in names}
    for name, report in reports.items():
        if name not in grouped:
            said[detector_title(name)] = report
            p_value = min(p_value, report.p_value * count)
    verdict, reason = _answer(said, _by_title(failures), _by_title(unfinished))
    guilty = [one for one in said.values() if one.verdict is Verdict.BACKDOORED]
    suspected, outliers = (
        tuple(sorted({label for one in ones for label in one.suspected}))
        for ones in (guilty, said.values())
    )
    return Audit(
        verdict,
        reason,
        own,
        dict(failures),
        alpha,
        suspected,
        outliers,
        together=together,
        unfinished=dict(unfinished),
        p_value=p_value,
    )


def not_scanned(reason: str, alpha: float) -> Audit:
    """The audit of a model that no detector looked at."""
    return Audit(Verdict.NOT_SCANNED, reason, {}, {}, alpha)


def _answer(
    said: Mapping[str, ScanReport | JointReport],
    failures: Mapping[str, str],
    unfinished: Mapping[str, str],
) -> tuple[Verdict, str]:
    """The verdict and why, from what was said, what failed and what was not finished, by title."""

    def of(*verdicts: Verdict) -> list[str]:
        return [_reason(title, one) for title, one in said.items() if one.verdict in verdicts]

    failed = [f"{title}: {why}." for title, why in failures.items()]
    if not said:
        late = [f"{title}: {why}." for title, why in unfinished.items()]
        return Verdict.NOT_SCANNED, " ".join([*failed, *late])
    if guilty := of(Verdict.BACKDOORED):
        verdict, reasons = Verdict.BACKDOORED, guilty
    elif starved := of(Verdict.NOT_SCANNED):
        verdict, reasons = Verdict.NOT_SCANNED, starved
    elif unsure := [*of(Verdict.INCONCLUSIVE), *failed]:
        verdict, reasons = Verdict.INCONCLUSIVE, unsure
    else:
        verdict = Verdict.CLEAN
        reasons = ["No label stands out. Nothing found is not proof that nothing is there."]
    if unfinished:
        why = next(iter(unfinished.values()))
        reasons = [*reasons, f"{', '.join(unfinished)} had no say: {why}."]
    return verdict, " ".join(reasons)


def _reason(title: str, said: ScanReport | JointReport) -> str:
    """Why; a joint report's reason names its detectors."""
    return said.reason if isinstance(said, JointReport) else f"{title}: {said.reason}"


def _by_title(reasons: Mapping[str, str]) -> dict[str, str]:
    return {detector_title(name): why for name, why in reasons.items()}
