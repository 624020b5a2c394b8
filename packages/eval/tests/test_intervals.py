"""Intervals against scipy, against closed forms, and against simulated coverage."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from wm_eval.intervals import exact_interval, exact_lower, exact_upper, paired_difference, wilson

COUNTS = [(0, 1), (1, 1), (0, 300), (3, 299), (150, 300), (299, 300), (300, 300), (9812, 10000)]


@pytest.mark.parametrize(("successes", "n"), COUNTS)
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_and_exact_agree_with_scipy(successes: int, n: int, level: float) -> None:
    test = stats.binomtest(successes, n)
    for method, interval in (("wilson", wilson), ("exact", exact_interval)):
        reference = test.proportion_ci(confidence_level=level, method=method)
        ours = interval(successes, n, level=level)
        assert ours.low == pytest.approx(reference.low, abs=1e-10)
        assert ours.high == pytest.approx(reference.high, abs=1e-10)


@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_one_sided_bounds_agree_with_the_beta_quantile(successes: int, n: int) -> None:
    upper = 1.0 if successes == n else stats.beta.ppf(0.95, successes + 1, n - successes)
    lower = 0.0 if successes == 0 else stats.beta.ppf(0.05, successes, n - successes + 1)
    assert exact_upper(successes, n) == pytest.approx(upper, abs=1e-10)
    assert exact_lower(successes, n) == pytest.approx(lower, abs=1e-10)


def test_none_of_n_has_the_closed_form() -> None:
    assert exact_upper(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299), abs=1e-12)
    assert exact_upper(0, 299) < 0.01


def test_paired_difference_known_values() -> None:
    # (40 + 1 - 12 - 1) / 102 = 0.2745..., spread sqrt((41 + 13) / 102 - 0.2745^2) / sqrt(102)
    found = paired_difference(40, 12, 100)
    assert found.value == pytest.approx(0.28)
    middle, spread = 28 / 102, ((54 / 102 - (28 / 102) ** 2) / 102) ** 0.5
    assert found.low == pytest.approx(middle - 1.959964 * spread, abs=1e-6)
    assert found.high == pytest.approx(middle + 1.959964 * spread, abs=1e-6)


def test_paired_difference_is_antisymmetric_and_never_a_point() -> None:
    there, back = paired_difference(7, 2, 50), paired_difference(2, 7, 50)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    same = paired_difference(0, 0, 50)
    assert same.value == 0 and same.low < 0 < same.high


def test_paired_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, n, rounds = 0.04, 0.02, 300, 2000
    draws = torch.rand(rounds, n, generator=generator)
    b = (draws < first).sum(1).tolist()
    c = ((draws >= first) & (draws < first + second)).sum(1).tolist()
    intervals = [paired_difference(i, j, n) for i, j in zip(b, c, strict=True)]
    covered = sum(x.low <= first - second <= x.high for x in intervals) / rounds
    assert 0.93 < covered < 0.98


@pytest.mark.parametrize("function", [wilson, exact_interval, exact_upper, exact_lower])
@pytest.mark.parametrize("bad", [(-1, 3), (4, 3), (0, 0), (0.5, 3), (True, 3), (1, 2.0)])
def test_counts_that_make_no_sense_are_refused(function, bad) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        function(*bad)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="level in"):
        wilson(1, 2, level=1.0)
    with pytest.raises(ValueError, match="at most 5 disagreements"):
        paired_difference(3, 3, 5)
