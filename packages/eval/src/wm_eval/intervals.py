"""Intervals for counted proportions: how far a rate measured on n images can be trusted.

Plain counting with the standard library, so that a number in a record can be checked by hand. Every
function takes how often something happened, ``successes`` in 0 .. n, of ``n`` >= 1 times, and the
``level`` of confidence in (0, 1); other values are a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """A two-sided confidence interval, both ends included."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference of two rates measured on the same images, with its interval."""

    value: float
    low: float
    high: float
    only_first: int  # images that only the first got right
    only_second: int  # images that only the second got right
    n: int


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        1927; no continuity correction.
    """
    _check_counts(successes, n, level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, share = successes / n, z * z / n
    centre = (rate + share / 2) / (1 + share)
    half = z * math.sqrt(rate * (1 - rate) / n + share / (4 * n)) / (1 + share)
    # At 0 and at n the end is exact; rounding would otherwise leave 1e-18 beside it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def exact_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """The exact (Clopper-Pearson) interval of a proportion, by bisection on the binomial tails.

    Source: C. J. Clopper and E. S. Pearson, 1934.
    """
    _check_counts(successes, n, level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: 1 - _cdf(successes - 1, n, p), tail)
    high = 1.0 if successes == n else _solve(lambda p: -_cdf(successes, n, p), -tail)
    return Interval(low, high)


def exact_upper(successes: int, n: int, *, level: float = 0.95) -> float:
    """The exact one-sided upper bound of a proportion: "0 of 300" leaves at most 0.99 %.

    Source: Clopper and Pearson, 1934, one side; for 0 of n it is 1 - (1 - level)^(1/n).
    """
    _check_counts(successes, n, level)
    if successes == n:
        return 1.0
    return _solve(lambda p: -_cdf(successes, n, p), -(1 - level))


def exact_lower(successes: int, n: int, *, level: float = 0.95) -> float:
    """The exact one-sided lower bound of a proportion: the mirror of `exact_upper`."""
    _check_counts(successes, n, level)
    return 1 - exact_upper(n - successes, n, level=level)


def paired_difference(
    only_first: int, only_second: int, n: int, *, level: float = 0.95
) -> Difference:
    """The difference of two success rates that were measured on the same n images.

    Only images on which the two disagree carry information about the difference; the interval is
    Wald's with one disagreement added on either side.

    Args:
        only_first: On how many images only the first succeeded.
        only_second: On how many images only the second succeeded.
        n: On how many images both were tried, at least 1.

    Returns:
        The first rate minus the second as measured, and the interval, in [-1, 1].

    Raises:
        ValueError: Counts that are not whole or do not fit each other, or a level outside (0, 1).

    Source: D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of
        binomial proportions based on paired data", 2012.
    """
    _check_counts(only_first, n, level)
    _check_counts(only_second, n, level)
    if only_first + only_second > n:
        raise ValueError(f"expected at most {n} disagreements, got {only_first} and {only_second}")
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    spread = math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    half = NormalDist().inv_cdf((1 + level) / 2) * spread
    low, high = max(-1.0, first - second - half), min(1.0, first - second + half)
    return Difference((only_first - only_second) / n, low, high, only_first, only_second, n)


def _check_counts(successes: int, n: int, level: float) -> None:
    for name, value in (("successes", successes), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected {name} as a whole number, got {value!r}")
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}")


def _cdf(successes: int, n: int, p: float) -> float:
    """P(X <= successes) for X ~ Binomial(n, p) with 0 < p < 1, summed in the log domain."""
    log_p, log_q, whole = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q)
        for k in range(successes + 1)
    )
    return min(1.0, math.fsum(terms))


def _solve(rising: Callable[[float], float], goal: float) -> float:
    """The p in (0, 1) at which a rising function reaches ``goal``, to the last bits of a float."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < goal:
            low = middle
        else:
            high = middle
    return (low + high) / 2
