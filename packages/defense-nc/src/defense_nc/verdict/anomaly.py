"""Is one label's score too small to be chance? The papers' rule, and one for a single scan.

The papers' rule, an index above 2, is a 5 % rule for *one* label of a known distribution; applied
to ten labels it flags about a third of clean models (simulated in the tests). `outlier_test`
compares each label with the others only, corrects for their number, and requires an effect. Where
clean models were scanned with the same settings, `Calibration.p_values` takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from scipy.special import stdtr
from torch import Tensor

from defense_nc.config import check_rule

_ZERO = 1e-6  # a score of zero counts as this share of the median: its logarithm must be finite


@dataclass(frozen=True)
class AnomalyIndex:
    """The papers' rule on K scores."""

    index: float  # of the model: the largest per-label index
    label: int  # whose index that is
    per_label: Tensor  # float64 (K,), in scaled deviations; 0 on the other side of the median
    median: float
    mad: float  # scaled by c
    flagged: tuple[int, ...]  # index above 2


class OutlierTest(NamedTuple):
    """A deciding rule on K scores."""

    p_values: Tensor  # float64 (K,), each already multiplied by K (Bonferroni), at most 1
    ratio: Tensor  # float64 (K,), score / median
    suspected: tuple[int, ...]  # significant, and far enough below the median


def mad_index(
    scores: Tensor,
    *,
    side: Literal["lower", "upper"] = "lower",
    median: Literal["mid", "low"] = "mid",
    c: float = 1.4826,
) -> AnomalyIndex:
    """Distance from the median in scaled median absolute deviations, on one side of it.

    Args:
        scores: Float ``(K,)``, K >= 2, finite.
        side: Which side of the median counts.
        median: "mid" averages the two middle values of an even K, as the papers do; "low" takes the
            lower one, as the PyTorch ports do. With ten labels the choice can decide the verdict.
        c: Makes the deviation estimate the standard deviation of a normal distribution.

    Returns:
        Infinite indices where more than half of the scores are the same number and this one is not.

    Source: Neural Cleanse, section IV; equation 6 of the reverse-generator paper.

    Examples:
        >>> mad_index(torch.tensor([10., 20, 30, 40, 50, 60, 70, 80, 90, 5])).label
        9
    """
    values = _check(scores, 2)
    if side not in ("lower", "upper") or median not in ("mid", "low"):
        raise ValueError(
            f"expected side lower or upper and median mid or low, got {side!r}, {median!r}"
        )
    if not c > 0:
        raise ValueError(f"expected c > 0, got {c}")
    take = torch.median if median == "low" else _mid_median
    middle = take(values)
    mad = c * take((values - middle).abs())
    below = (middle - values if side == "lower" else values - middle).clamp(min=0)
    # 0 / 0 is no deviation at all; anything else over 0 is infinitely many.
    per_label = torch.where(below > 0, below / mad, 0.0)
    label = int(per_label.argmax())
    flagged = tuple((per_label > 2).nonzero().flatten().tolist())
    return AnomalyIndex(
        float(per_label[label]), label, per_label, float(middle), float(mad), flagged
    )


def outlier_test(scores: Tensor, *, alpha: float = 0.05, max_ratio: float = 0.5) -> OutlierTest:
    """Test each label's log score against the prediction that the other K - 1 labels make for it.

    If all labels are clean and their scores log-normal, any label is significant with probability
    at most ``alpha``, whatever their common size and spread. Two targets in one model partly mask
    each other: each widens the other's prediction.

    Args:
        scores: Float ``(K,)``, K >= 3, finite, not negative.
        alpha: In (0, 1).
        max_ratio: A suspected label's score is at most this share of the median, in (0, 1].

    Source: Student's prediction interval for one new observation, K - 2 degrees of freedom; ours.
    """
    values = _check(scores, 3)
    if values.min() < 0:
        raise ValueError(f"expected scores >= 0, got {float(values.min()):.4g}")
    check_rule(alpha, max_ratio)
    count = len(values)
    middle = _mid_median(values)
    if middle == 0:  # nothing lies below it
        return OutlierTest(torch.ones_like(values), torch.ones_like(values), ())
    logs = values.clamp(min=_ZERO * float(middle)).log()
    others = logs.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    deviation, mean = torch.std_mean(others, dim=1)
    distance = logs - mean
    # Rounding leaves a spread of about 1e-16 where the others are equal: no spread to judge by.
    spread = (deviation * (1 + 1 / (count - 1)) ** 0.5).clamp(min=1e-12)
    p_values = torch.from_numpy(stdtr(count - 2, (distance / spread).numpy())).mul(count)
    p_values = p_values.clamp(max=1)
    ratio = values / middle
    suspected = ((p_values <= alpha) & (ratio <= max_ratio)).nonzero().flatten()
    return OutlierTest(p_values, ratio, tuple(suspected.tolist()))


def _check(scores: Tensor, least: int) -> Tensor:
    """The scores as float64 on the CPU."""
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"expected scores as a float tensor (K,), got {got}")
    if scores.ndim != 1 or len(scores) < least:
        raise ValueError(f"expected scores of shape (K,), K >= {least}, got {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("expected finite scores, got NaN or infinity")
    return scores.detach().double().cpu()


def _mid_median(values: Tensor) -> Tensor:
    return torch.quantile(values, 0.5)
