"""Label z-scores with a variance shrunk towards that of clean models.

Ten scores say little about their own spread, so it is shrunk towards the spread of clean models,
the more so the less those differ (limma's moderated statistic). Medians are used throughout: up to
a third of the labels may be outliers without masking each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from scipy.special import digamma, polygamma, stdtr
from torch import Tensor

_ZERO = 1e-6  # a score of zero counts as this share of the median: its logarithm must be finite
_CONSISTENT = 1.4826  # makes the median absolute deviation estimate that of a normal distribution
# The median absolute deviation of n normal numbers is worth as much as the ordinary deviation of
# about 0.37 n of them; the constant is fitted to small n. A simulation in the tests shows it.
_WORTH, _OFFSET = 0.37, 0.4
_FEW = 8  # labels: of fewer this approximation says too little
_MOST = 1000.0  # degrees of freedom of a prior that all models agree on
_FLAT = 1e-5  # the smallest variance that is believed, as a share of the middle one


class Prior(NamedTuple):
    """The spread of clean models' log scores."""

    sigma: float  # usual deviation of a label's log score, > 0
    df: float  # how much that is worth, in degrees of freedom: large where models agree


class Spread(NamedTuple):
    """The spread of one clean model's log scores."""

    scale: float  # their deviation, >= 0
    df: float  # its degrees of freedom, > 0


def log_scores(scores: Tensor) -> Tensor:
    """Natural logarithms of scores >= 0, float64; a zero counts as a millionth of the median."""
    values = scores.detach().double().cpu()
    middle = float(torch.quantile(values, 0.5))
    return values.clamp(min=_ZERO * middle if middle > 0 else _ZERO).log()


def robust_scale(values: Tensor) -> tuple[Tensor, float]:
    """Scaled median absolute deviation along the last dimension, and its degrees of freedom.

    >>> scale, df = robust_scale(torch.tensor([1.0, 2, 3, 4, 100]))
    >>> round(float(scale), 4), round(df, 2)
    (1.4826, 1.88)

    Of one or two values it is the ordinary deviation, with none or one.
    """
    if values.shape[-1] < 3:
        return _ordinary_scale(values)
    middle = torch.quantile(values, 0.5, dim=-1, keepdim=True)
    scale = _CONSISTENT * torch.quantile((values - middle).abs(), 0.5, dim=-1)
    return scale, _WORTH * (values.shape[-1] - 1) + _OFFSET


def _ordinary_scale(values: Tensor) -> tuple[Tensor, float]:
    count = values.shape[-1]
    return values.std(dim=-1, correction=min(1, count - 1)), float(count - 1)


def fit_prior(scales: Sequence[float], dfs: Sequence[float]) -> Prior:
    """Estimate the typical spread of clean models, and how much it varies between them.

    Args:
        scales: Deviation of the log scores within each model, >= 0, not all 0.
        dfs: Degrees of freedom of each, > 0.

    Source: the moments of Smyth (2004), Linear models and empirical Bayes methods, section 6.2.
    """
    if len(scales) < 2 or len(scales) != len(dfs):
        raise ValueError(f"expected as many scales as dfs, >= 2, got {len(scales)} and {len(dfs)}")
    if min(scales) < 0 or not max(scales) > 0 or min(dfs) <= 0:
        raise ValueError("expected scales >= 0, not all 0, and dfs > 0")
    variances, halves = torch.tensor(scales).double() ** 2, torch.tensor(dfs).double() / 2
    variances = variances.clamp(min=_FLAT * float(variances[variances > 0].median()))
    logs = variances.log() - torch.from_numpy(digamma(halves.numpy())) + halves.log()
    excess = float(logs.var()) - float(polygamma(1, halves.numpy()).mean())
    # trigamma(df / 2) is the excess: what differs between models beyond chance.
    if excess <= float(polygamma(1, _MOST / 2)):
        return Prior(math.exp(float(logs.mean()) / 2), _MOST)
    half = float(brentq(lambda h: float(polygamma(1, h)) - excess, 1e-6, _MOST))
    return Prior(
        math.exp((float(logs.mean()) + float(digamma(half)) - math.log(half)) / 2), 2 * half
    )


def spread_of(logs: Tensor) -> Spread:
    """The spread of a clean model's log scores ``(K,)``."""
    # Of few labels the ordinary deviation, which is exact: clean models have no outliers.
    scale, df = robust_scale(logs) if len(logs) >= _FEW else _ordinary_scale(logs)
    return Spread(float(scale), df)


def prior_of(spreads: Sequence[Spread]) -> Prior:
    """The prior of clean models' spreads; errors as for `fit_prior`."""
    scales, dfs = zip(*spreads, strict=True)
    return fit_prior(scales, dfs)


def moderated_p_values(logs: Tensor, prior: Prior) -> Tensor:
    """One-sided p-values of each label's log score ``(K,)``, K >= 2, against the others' median.

    The probability that one clean label lies this far below, for normal log scores with one spread
    per model; `Calibration.p_values` corrects the tail.

    Source: Smyth (2004), the moderated t-statistic; medians in place of means and leaving each
        label out of its own reference are ours.
    """
    count = len(logs)
    if logs.ndim != 1 or count < 2:
        raise ValueError(f"expected log scores of shape (K,), K >= 2, got {tuple(logs.shape)}")
    if not prior.sigma > 0 or not prior.df > 0:
        raise ValueError(f"expected a prior with sigma > 0 and df > 0, got {prior}")
    others = logs.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    scale, df = robust_scale(others)
    variance = (prior.df * prior.sigma**2 + df * scale**2) / (prior.df + df)
    # The median of n normal numbers has pi / 2n times their variance; of one or two it is the mean.
    median = 1 / (count - 1) if count <= 3 else math.pi / 2 / (count - 1)
    spread = (variance * (1 + median)).sqrt()
    distance = (logs - torch.quantile(others, 0.5, dim=1)) / spread
    return torch.from_numpy(stdtr(prior.df + df, distance.numpy()))
