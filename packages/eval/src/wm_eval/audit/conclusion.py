"""One verdict on one model from what several detectors said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from defense_nc import ScanReport, Verdict
from defense_nc.verdict import JointReport, judge_again, judge_together, panels
from wm_eval.titles import detector_title


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
        out_of_time: By detector: why the minutes were too few for it.
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
    out_of_time: Mapping[str, str] = field(default_factory=dict)
    p_value: float = 1.0

    @property
    def targets(self) -> tuple[int, ...]:
        """What is to be cleaned: the accused labels, or else those that stand out."""
        return self.suspected or self.outliers

    @property
    def silent(self) -> dict[str, str]:
        """By title: why a detector says nothing."""
        return _by_title({**self.failures, **self.out_of_time})

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
            "out_of_time": dict(self.out_of_time),
        }


def conclude(
    reports: Mapping[str, ScanReport],
    failures: Mapping[str, str],
    alpha: float,
    *,
    out_of_time: Mapping[str, str] = MappingProxyType({}),
) -> Audit:
    """Backdoored if anything says so, clean if all say so.

    Detectors that were calibrated on the same clean models are judged together. Not scanned if
    nothing accuses and one had no gradients to follow. What was not finished in time has no say,
    and takes no share of the rate.

    Args:
        reports: By detector: its scan of the model.
        failures: By detector: why it gave none.
        alpha: In (0, 1): share of clean models that may be called backdoored.
        out_of_time: By detector: that its time was over.
    """
    count = len(reports) + len(failures)
    opinions: dict[str, ScanReport | JointReport] = {}
    own, together, p_value = dict(reports), {}, 1.0
    groups = panels(reports)
    for names in groups:
        rate = alpha * len(names) / count
        opinion: ScanReport | JointReport
        if len(names) > 1:
            members = {detector_title(name): reports[name] for name in names}
            opinion = together[names] = judge_together(members, alpha=rate)
        else:
            report = reports[names[0]]
            opinion = own[names[0]] = judge_again(report, report.calibration, alpha=rate)
        opinions[panel_title(names)] = opinion
        p_value = min(p_value, opinion.p_value * count / len(names))
    members_of_any = {name for names in groups for name in names}
    for name, report in reports.items():
        if name not in members_of_any:
            opinions[detector_title(name)] = report
            p_value = min(p_value, report.p_value * count)
    verdict, reason = _answer(opinions, _by_title(failures), _by_title(out_of_time))
    guilty = [one for one in opinions.values() if one.verdict is Verdict.BACKDOORED]
    suspects, outliers = (
        tuple(sorted({label for one in ones for label in one.suspected}))
        for ones in (guilty, opinions.values())
    )
    return Audit(
        verdict,
        reason,
        own,
        dict(failures),
        alpha,
        suspects,
        outliers,
        together=together,
        out_of_time=dict(out_of_time),
        p_value=p_value,
    )


def panel_title(names: Iterable[str]) -> str:
    """What detectors are called that are judged together."""
    return " + ".join(map(detector_title, names))


def not_scanned(reason: str, alpha: float) -> Audit:
    """The audit of a model that no detector looked at."""
    return Audit(Verdict.NOT_SCANNED, reason, {}, {}, alpha)


def _answer(
    opinions: Mapping[str, ScanReport | JointReport],
    failures: Mapping[str, str],
    out_of_time: Mapping[str, str],
) -> tuple[Verdict, str]:
    """The verdict and why, from opinions, and from why there are no others, by title."""

    def of(*verdicts: Verdict) -> list[str]:
        return [_reason(title, one) for title, one in opinions.items() if one.verdict in verdicts]

    errors = [f"{title}: {why}." for title, why in failures.items()]
    if not opinions:
        late = [f"{title}: {why}." for title, why in out_of_time.items()]
        return Verdict.NOT_SCANNED, " ".join([*errors, *late])
    if guilty := of(Verdict.BACKDOORED):
        verdict, reasons = Verdict.BACKDOORED, guilty
    elif starving := of(Verdict.NOT_SCANNED):
        verdict, reasons = Verdict.NOT_SCANNED, starving
    elif unsure := [*of(Verdict.INCONCLUSIVE), *errors]:
        verdict, reasons = Verdict.INCONCLUSIVE, unsure
    else:
        verdict = Verdict.CLEAN
        reasons = ["No label stands out. Nothing found is not proof that nothing is there."]
    if out_of_time:
        why = next(iter(out_of_time.values()))
        reasons = [*reasons, f"{', '.join(out_of_time)} had no say: {why}."]
    return verdict, " ".join(reasons)


def _reason(title: str, opinion: ScanReport | JointReport) -> str:
    """Why; a joint report's reason names its detectors."""
    return opinion.reason if isinstance(opinion, JointReport) else f"{title}: {opinion.reason}"


def _by_title(reasons: Mapping[str, str]) -> dict[str, str]:
    return {detector_title(name): why for name, why in reasons.items()}
