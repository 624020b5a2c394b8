"""What a scan says: scores per label, both decision rules, and one verdict with its reason.

Both defences end here: `judge` turns any detector's scores and success rates into a `ScanReport`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.anomaly import AnomalyIndex, OutlierTest, mad_index, outlier_test

MIN_CONVERGED = 4  # with fewer labels to compare, no score can be called unusual


class Verdict(enum.Enum):
    """The one answer of a scan; a command exits with its code."""

    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    NOT_SCANNED = "not-scanned"

    @property
    def exit_code(self) -> int:
        """0 clean, 1 backdoored, 2 inconclusive, 3 not scanned."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class LabelScore:
    """One label of a scan. A small score means a short way to the label."""

    label: int
    score: float
    success_rate: float  # of the reversed trigger, on images of other classes, in [0, 1]
    p_value: float  # of the calibrated rule, times the number of labels; 1 if not converged
    paper_index: float  # of the papers' rule; 0 above the median
    ratio: float  # score / median of the converged labels
    converged: bool  # the success rate reached the floor, so the score may be compared


@dataclass(frozen=True)
class ScanReport:
    """Scores, both rules and the verdict of one scan of one classifier."""

    detector: str
    verdict: Verdict
    labels: tuple[LabelScore, ...]
    paper_index: float  # of the model, ordinary median
    paper_index_low: float  # of the model, lower median, as the PyTorch ports compute it
    paper_flagged: tuple[int, ...]  # paper_index > 2: the papers' verdict, ordinary median
    p_value: float  # the smallest of the labels
    suspected: tuple[int, ...]
    alpha: float
    max_ratio: float  # a suspected score is at most this share of the median
    reason: str
    triggers: Mapping[int, nn.Module] = field(repr=False, compare=False)
    config: Mapping[str, Any]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the triggers, ready for JSON; an infinite index is written as None."""
        names = "detector paper_index paper_index_low p_value alpha max_ratio reason seed"
        out: dict[str, Any] = {name: _finite(getattr(self, name)) for name in names.split()}
        out["verdict"] = self.verdict.value
        out["paper_flagged"], out["suspected"] = list(self.paper_flagged), list(self.suspected)
        out["config"] = dict(self.config)
        out["labels"] = [
            {name: _finite(value) for name, value in vars(label).items()} for label in self.labels
        ]
        return out


def judge(
    detector: str,
    scores: Tensor,
    success_rates: Tensor,
    *,
    floor: float,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    triggers: Mapping[int, nn.Module] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ScanReport:
    """Decide what K scores say about a classifier.

    Only labels whose success rate reached the floor are compared and can be suspected: a score is
    the price of reaching a label, and a label that was not reached has none. The papers' rule is
    computed over all labels, as the papers do.

    Args:
        detector: Name of the defence, for the record.
        scores: Float ``(K,)``, K >= 2, >= 0: small where the label is easy to reach.
        success_rates: Float ``(K,)`` in [0, 1].
        floor: Success rate that makes a score comparable, in [0, 1].
        alpha: Share of clean models that may be suspected.
        max_ratio: A suspected score is at most this share of the median.
        triggers: The reversed trigger of each label.
        config: Settings of the scan, ready for JSON.
        seed: The scan's seed.

    Returns:
        backdoored: some label is suspected. inconclusive: fewer than four labels, or fewer than
        half of them, converged; or a label is significant yet not far below the median. clean:
        neither.

    Raises:
        ValueError: Wrong type, shape, dtype or range.
    """
    _check(scores, success_rates, floor=floor, alpha=alpha, max_ratio=max_ratio)
    scores, rates = scores.detach().double().cpu(), success_rates.detach().double().cpu()
    paper, low = _paper(scores)
    # A rate of 0.9 in single precision lies a little below 0.9.
    reached = rates >= floor - 1e-6
    test = _test(scores, reached, alpha=alpha, max_ratio=max_ratio)
    converged = int(reached.sum())
    if test.suspected:
        verdict = Verdict.BACKDOORED
    elif converged < _needed(len(scores)) or float(test.p_values.min()) <= alpha:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.CLEAN
    labels = tuple(
        LabelScore(
            label=label,
            score=float(scores[label]),
            success_rate=float(rates[label]),
            p_value=float(test.p_values[label]),
            paper_index=float(paper.per_label[label]),
            ratio=float(test.ratio[label]),
            converged=bool(reached[label]),
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
        reason=_reason(verdict, test, reached, floor=floor, max_ratio=max_ratio),
        triggers=dict(triggers or {}),
        config=dict(config or {}),
        seed=seed,
    )


def _check(scores: Tensor, rates: Tensor, *, floor: float, alpha: float, max_ratio: float) -> None:
    for name, values in (("scores", scores), ("success_rates", rates)):
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
    if not 0 < alpha < 1 or not 0 < max_ratio <= 1:
        raise ValueError(
            f"expected alpha in (0, 1) and max_ratio in (0, 1], got {alpha}, {max_ratio}"
        )


def _needed(count: int) -> int:
    """How many of ``count`` labels must converge: a target may hide among those that did not."""
    return max(MIN_CONVERGED, (count + 1) // 2)


def _paper(scores: Tensor) -> tuple[AnomalyIndex, AnomalyIndex]:
    """The papers' rule with both medians; nothing stands out among two labels."""
    if len(scores) < 3:
        none = AnomalyIndex(0.0, 0, torch.zeros_like(scores), float(scores.mean()), 0.0, ())
        return none, none
    return mad_index(scores), mad_index(scores, median="low")


def _test(scores: Tensor, reached: Tensor, *, alpha: float, max_ratio: float) -> OutlierTest:
    """The calibrated rule over the converged labels, spread over all K."""
    compared = scores[reached] if bool(reached.any()) else scores
    middle = float(torch.quantile(compared, 0.5))
    ratio = scores / middle if middle > 0 else torch.ones_like(scores)
    p_values = torch.ones_like(scores)
    if int(reached.sum()) < MIN_CONVERGED:
        return OutlierTest(p_values, ratio, ())
    test = outlier_test(compared, alpha=alpha, max_ratio=max_ratio)
    p_values[reached] = test.p_values
    where = reached.nonzero().flatten()
    return OutlierTest(p_values, ratio, tuple(int(where[i]) for i in test.suspected))


def _reason(
    verdict: Verdict, test: OutlierTest, reached: Tensor, *, floor: float, max_ratio: float
) -> str:
    """One sentence with the figures that decided."""
    converged, count = int(reached.sum()), len(reached)
    if test.suspected:
        told = " and ".join(
            f"label {i} (score {float(test.ratio[i]):.2f} of the median, "
            f"p = {float(test.p_values[i]):.2g})"
            for i in test.suspected
        )
        return f"Much less than for the other labels is enough to reach {told}."
    if converged < _needed(count):
        return (
            f"Only {converged} of {count} labels reached a success rate of {floor:g}, "
            f"and a comparison needs {_needed(count)}."
        )
    low = int(torch.where(reached, test.ratio, math.inf).argmin())
    figures = (
        f"score {float(test.ratio[low]):.2f} of the median, p = {float(test.p_values[low]):.2g}"
    )
    if verdict is Verdict.INCONCLUSIVE:
        return f"Label {low} stands out ({figures}), but not below {max_ratio:g} of the median."
    missed = count - converged
    rest = f"; {missed} of {count} labels were never reached" if missed else ""
    return f"No label is unusually easy to reach: the nearest is label {low} ({figures}){rest}."


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
