"""The lower tail of nominal p-values of clean labels, which are not exactly uniform.

Beyond a threshold, the share of smaller p-values falls as a power of the nominal one; its exponent
is estimated from the smallest tenth of the clean labels' p-values, or less where there are many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_SHARE = 0.1  # of the clean labels make up the tail at most
_PEAKS = 2.0  # times the root of their number suffice: the further out, the better the fit
SMALLEST = 1e-300  # a p-value of zero has no logarithm


class Tail(NamedTuple):
    """The tail of nominal p-values of clean labels.

    With exact p-values the threshold is the share and the exponent 1.
    """

    share: float  # in (0, 1): of the clean labels that lie below the threshold
    threshold: float  # in (0, 1)
    exponent: float  # in (0, 1]: below 1 where small p-values are more frequent than nominal
    peaks: int  # how many labels below the threshold the exponent was estimated from


def fit_tail(p_values: Tensor) -> Tail:
    """Fit the tail to nominal p-values ``(n,)``, n >= 20, of all labels of all clean models.

    It is never lighter than the nominal one: a few clean models whose low labels lie close together
    are no evidence for that.

    Source: peaks over a threshold with an exponential tail of ``-log p``; ours, in neither paper.
    """
    if p_values.ndim != 1 or len(p_values) < 20:
        raise ValueError(f"expected p-values of shape (n,), n >= 20, got {tuple(p_values.shape)}")
    surprise = -p_values.double().clamp(SMALLEST, 1).log()
    share = min(_SHARE, _PEAKS / len(surprise) ** 0.5)
    threshold = float(torch.quantile(surprise, 1 - share, interpolation="lower"))
    peaks = surprise[surprise > threshold] - threshold
    if len(peaks) == 0 or not threshold > 0:
        raise ValueError("expected p-values that differ")
    return Tail(share, math.exp(-threshold), min(1.0, 1 / float(peaks.mean())), len(peaks))


def tail_p_values(nominal: Tensor, tail: Tail) -> Tensor:
    """Correct nominal p-values ``(K,)`` of single labels by the tail of clean labels.

    Below the threshold ``-log p``, less the threshold's and divided by the mean of the peaks,
    follows an F distribution with 2 and 2 ``peaks`` degrees of freedom, which allows for the error
    of the exponent. Above it, a power takes the threshold to the share and 1 to 1.

    >>> p = torch.tensor([0.5, 0.1, 0.001]).double()
    >>> [round(x, 4) for x in tail_p_values(p, Tail(0.1, 0.1, 1.0, 20)).tolist()]
    [0.5, 0.1, 0.0016]
    """
    surprise, edge = -nominal.clamp(SMALLEST, 1).log(), -math.log(tail.threshold)
    beyond = (surprise - edge).clamp(min=0)
    below = math.log(tail.share) - tail.peaks * torch.log1p(tail.exponent * beyond / tail.peaks)
    above = math.log(tail.share) / edge * surprise
    return torch.where(surprise > edge, below, above).exp()
