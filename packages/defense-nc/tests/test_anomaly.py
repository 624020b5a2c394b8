"""Both decision rules: known values, independent implementations, and what chance does to them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from defense_nc import mad_index, outlier_test

TEN = torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 90, 5])


def test_known_value_with_the_ordinary_median():
    found = mad_index(TEN)
    assert found.index == pytest.approx(1.0792, abs=1e-4)
    assert (found.label, found.median, found.flagged) == (9, 45.0, ())


def test_known_value_with_the_lower_median():
    found = mad_index(TEN, median="low")
    assert found.index == pytest.approx(1.1804, abs=1e-4)
    assert found.median == 40.0


def test_the_median_alone_can_decide_the_verdict():
    scores = torch.tensor([40.0, 48, 49, 50, 51, 55, 56, 57, 58, 59])
    assert mad_index(scores).flagged == (0,)
    assert mad_index(scores, median="low").flagged == ()


def test_against_scipy(subtests):
    for seed in range(5):
        with subtests.test(seed=seed):
            scores = np.random.default_rng(seed).lognormal(size=11)
            deviation = stats.median_abs_deviation(scores, scale=1 / 1.4826)
            expected = np.clip((np.median(scores) - scores) / deviation, 0, None)
            found = mad_index(torch.from_numpy(scores))
            np.testing.assert_allclose(found.per_label.numpy(), expected, rtol=1e-12)
            assert found.index == pytest.approx(expected.max())
            assert found.flagged == tuple(np.flatnonzero(expected > 2))


def test_constant_scores_have_index_zero():
    found = mad_index(torch.full((10,), 7.0))
    assert (found.index, found.mad, found.flagged) == (0.0, 0.0, ())


def test_one_different_among_constant_scores_is_infinitely_far():
    assert mad_index(torch.tensor([5.0, 5, 5, 5, 1])).index == math.inf
    assert mad_index(torch.tensor([5.0, 5, 5, 5, 9])).index == 0


def test_large_scores_are_never_flagged():
    scores = torch.tensor([10.0, 11, 12, 13, 1000])
    assert mad_index(scores).flagged == ()
    assert mad_index(scores, side="upper").flagged == (4,)


@pytest.mark.integration
def test_scale_does_not_matter():
    assert mad_index(TEN * 1e-3).index == pytest.approx(mad_index(TEN).index)
    torch.testing.assert_close(outlier_test(TEN * 1e-3).p_values, outlier_test(TEN).p_values)


def test_p_values_against_the_prediction_interval_of_a_regression():
    """A one-sample t-test of "this label differs" is a regression on a dummy variable."""
    logs = TEN.double().log().numpy()
    found = outlier_test(TEN).p_values.numpy()
    for label in range(10):
        design = np.stack([np.ones(10), np.eye(10)[label]], axis=1)
        beta, residual, *_ = np.linalg.lstsq(design, logs, rcond=None)
        variance = residual[0] / 8 * np.linalg.inv(design.T @ design)[1, 1]
        expected = min(1.0, 10 * stats.t.cdf(beta[1] / variance**0.5, df=8))
        assert found[label] == pytest.approx(expected, rel=1e-9)


def test_a_backdoor_is_suspected_and_a_small_difference_is_not():
    clean = [100.0, 101, 103, 104, 106, 108, 110, 112, 117]
    assert outlier_test(torch.tensor([*clean, 25.0])).suspected == (9,)
    small = outlier_test(torch.tensor([*clean, 70.0]))
    assert float(small.p_values[9]) < 0.001
    assert small.suspected == ()
    assert outlier_test(torch.tensor([*clean, 70.0]), max_ratio=0.7).suspected == (9,)


def test_the_papers_rule_misses_a_wide_gap_that_the_default_names():
    # Measured once on a badly poisoned model: a fifth of the median, and the index stays below 2.
    scores = torch.tensor([11.4, 41, 50, 62, 70, 84, 96, 110, 122, 133])
    assert mad_index(scores).index < 2
    assert outlier_test(scores).suspected == (0,)


@pytest.mark.integration
@pytest.mark.parametrize("draw", ["normal", "lognormal"])
def test_what_chance_does_on_clean_ten_class_models(draw):
    """The papers' rule flags a third of clean models by chance; the default keeps its promise."""
    generator = np.random.default_rng(0)
    models = 2000
    papers = ours = floor = 0
    for _ in range(models):
        if draw == "normal":
            scores = generator.normal(100, 15, size=10).clip(min=1)
        else:
            scores = generator.lognormal(0, 0.35, size=10)
        tensor = torch.from_numpy(scores)
        papers += bool(mad_index(tensor).flagged)
        test = outlier_test(tensor)
        ours += bool((test.p_values <= 0.05).any())
        floor += bool(test.suspected)
    if draw == "normal":
        assert 0.29 < papers / models < 0.38
    else:
        # 0.05 and three standard errors; without the effect floor.
        assert ours / models < 0.05 + 3 * (0.05 * 0.95 / models) ** 0.5
        assert 0.12 < papers / models < 0.20
    assert floor <= ours
    assert floor / models < 0.05


def test_zero_scores():
    assert outlier_test(torch.zeros(5)).suspected == ()
    # A zero is judged like any very small number.
    assert outlier_test(torch.tensor([0.0, 9, 10, 11, 10, 9.5])).suspected == (0,)


def test_equal_scores_leave_no_spread_to_judge_by():
    assert outlier_test(torch.full((10,), 0.1)).suspected == ()
    assert outlier_test(torch.tensor([5.0, 5, 5, 5, 1])).suspected == (4,)


def test_refused_scores(subtests):
    for rule in [mad_index, outlier_test]:
        for scores in [
            [1.0, 2, 3],
            torch.tensor([1, 2, 3]),
            torch.ones(1),
            torch.ones(0),
            torch.ones(3, 3),
            torch.tensor([1.0, 2, math.nan]),
            torch.tensor([1.0, 2, math.inf]),
        ]:
            with (
                subtests.test(rule=rule, scores=scores),
                pytest.raises(ValueError, match="expected"),
            ):
                rule(scores)


def test_refused_settings():
    for wrong in ({"side": "left"}, {"median": "high"}, {"c": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            mad_index(TEN, **wrong)
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"max_ratio": 0.0}, {"max_ratio": 2.0}):
        with pytest.raises(ValueError, match="expected"):
            outlier_test(TEN, **wrong)
    with pytest.raises(ValueError, match=">= 0"):
        outlier_test(-TEN)
