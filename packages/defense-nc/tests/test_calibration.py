"""Calibrated p-values: independent implementations, and the error rate that they promise."""

import json
import math
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import polygamma

from defense_nc.verdict import calibration as shipped
from defense_nc.verdict.calibrate import clean_model, fit_calibration, refit
from defense_nc.verdict.calibration import (
    Calibration,
    load_calibration,
    read_calibrations,
    write_calibrations,
)
from defense_nc.verdict.shrinkage import (
    Prior,
    fit_prior,
    log_scores,
    moderated_p_values,
    prior_of,
    robust_scale,
    spread_of,
)
from defense_nc.verdict.tail_fit import Tail, fit_tail, tail_p_values


def test_robust_scale_against_scipy():
    values = np.random.default_rng(0).normal(size=(4, 11))
    scale, _ = robust_scale(torch.from_numpy(values))
    expected = stats.median_abs_deviation(values, axis=1, scale=1 / 1.4826)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-12)


def test_its_degrees_of_freedom_are_those_of_its_logarithm(subtests):
    for count in [5, 9, 20, 42]:
        with subtests.test(count=count):
            values = torch.from_numpy(np.random.default_rng(0).normal(size=(20000, count)))
            scale, df = robust_scale(values)
            # The log of a variance with df degrees of freedom varies by trigamma(df / 2).
            assert float((2 * scale.log()).var()) == pytest.approx(
                float(polygamma(1, df / 2)), rel=0.12
            )


def test_the_prior_is_recovered():
    generator = np.random.default_rng(0)
    variances = 0.04 * 8 / generator.chisquare(8, size=3000)  # sigma 0.2 worth 8 degrees
    scales = np.sqrt(variances * generator.chisquare(5, size=3000) / 5)
    found = fit_prior(scales.tolist(), [5.0] * 3000)
    assert found.sigma == pytest.approx(0.2, rel=0.03)
    assert found.df == pytest.approx(8, rel=0.15)


def test_models_that_agree_are_a_firm_prior():
    assert fit_prior([0.2] * 10, [4.0] * 10).df == 1000
    assert fit_prior([0.2, 0.0, 0.2], [4.0] * 3).sigma > 0


def test_moderated_p_values_against_a_loop():
    logs = torch.tensor([3.4, 3.5, 3.3, 3.6, 3.45, 1.0]).double()
    found = moderated_p_values(logs, Prior(0.2, 6.0))
    for label in range(6):
        others = np.delete(logs.numpy(), label)
        scale = 1.4826 * np.median(np.abs(others - np.median(others)))
        df = 0.37 * 4 + 0.4
        variance = (6 * 0.04 + df * scale**2) / (6 + df) * (1 + np.pi / 2 / 5)
        z = (float(logs[label]) - np.median(others)) / np.sqrt(variance)
        assert float(found[label]) == pytest.approx(stats.t.cdf(z, 6 + df), rel=1e-9)


def test_a_firm_prior_is_a_normal_test_with_its_own_spread():
    logs = torch.tensor([0.1, -0.1, 0.0, 0.0, -0.6]).double()
    expected = stats.norm.cdf(-0.6 / (0.2 * math.sqrt(1 + math.pi / 8)))
    assert float(moderated_p_values(logs, Prior(0.2, 1e7))[4]) == pytest.approx(expected, rel=1e-4)


def test_two_labels_are_compared_by_the_spread_of_other_models():
    found = moderated_p_values(torch.tensor([0.0, 1.0]).double(), Prior(0.2, 6.0))
    expected = stats.t.cdf(-1 / (0.2 * math.sqrt(2)), 6)
    np.testing.assert_allclose(found.numpy(), [expected, 1 - expected], rtol=1e-9)


def test_the_spread_of_two_values_is_the_ordinary_one():
    scale, df = robust_scale(torch.tensor([1.0, 3.0]).double())
    assert (float(scale), df) == (pytest.approx(math.sqrt(2)), 1)


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_clean_labels_are_as_significant_as_stated(count):
    random, truth = np.random.default_rng(0), Prior(0.3, 8.0)
    spreads = truth.sigma * np.sqrt(truth.df / random.chisquare(truth.df, (4000, 1)))
    models = torch.from_numpy(spreads * random.normal(size=(4000, count)))
    found = torch.cat([moderated_p_values(logs, truth) for logs in models])
    for level in (0.01, 0.05):
        assert float((found <= level).double().mean()) == pytest.approx(level, rel=0.3)
    assert prior_of([spread_of(logs) for logs in models]).sigma == pytest.approx(
        truth.sigma, rel=0.1
    )


def test_log_scores_of_zeros_are_finite():
    assert torch.isfinite(log_scores(torch.zeros(4))).all()
    assert float(log_scores(torch.tensor([0.0, 1, 1, 1]))[0]) == pytest.approx(math.log(1e-6))


def test_a_tail_that_is_right_changes_nothing():
    uniform = (torch.arange(4000).double() + 0.5) / 4000
    tail = fit_tail(uniform)
    assert tail.share == pytest.approx(2 / 4000**0.5)
    assert tail.threshold == pytest.approx(tail.share, rel=0.02)
    assert tail.exponent == pytest.approx(1, rel=0.05)
    assert fit_tail(uniform[::20]).share == 0.1
    torch.testing.assert_close(tail_p_values(uniform, tail), uniform, rtol=0.05, atol=1e-4)


def test_the_tail_corrects_a_power_and_is_never_lighter():
    uniform = (torch.arange(4000).double() + 0.5) / 4000
    heavy = fit_tail(uniform**2)
    assert heavy.exponent == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(tail_p_values(uniform**2, heavy), uniform, rtol=0.05, atol=1e-4)
    assert fit_tail(uniform**0.5).exponent == 1


def test_few_peaks_make_p_values_larger():
    tiny = torch.tensor([1e-6]).double()
    few, many = (float(tail_p_values(tiny, Tail(0.1, 0.1, 1.0, n))) for n in (5, 500))
    assert few > 20 * many
    # The tail of an F distribution, written out.
    x = math.log(0.1 / 1e-6)
    assert few == pytest.approx(0.1 * stats.f.sf(x, 2, 10), rel=1e-9)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("noise", "counts", "allowed"),
    [
        ("normal", (10,), 0.065),
        ("normal", (43,), 0.065),
        ("normal", (10, 43), 0.065),
        ("skewed", (10,), 0.05),
        ("skewed", (43,), 0.05),
        ("heavy", (10,), 0.085),
        # Far out, Student's t with 4 degrees of freedom is heavier than any power of a p-value.
        ("heavy", (43,), 0.12),
    ],
)
def test_the_rule_keeps_its_error_rate_on_clean_models(noise, counts, allowed, drawn, simulated):
    """Alpha 0.05, over 4 calibrations of 40 models a count, each on 250 models it never saw."""
    alarms = []
    for seed in range(4):
        calibration, generator = simulated(seed, counts, noise), np.random.default_rng(100 + seed)
        for _ in range(250 // len(counts)):
            for count in counts:
                found = calibration.p_values(drawn(generator, count, noise))
                alarms.append(bool(found.min() <= 0.05))
    assert np.mean(alarms) <= allowed


def test_a_target_is_found_where_the_scans_own_scores_do_not_suffice(calibration, drawn):
    generator = np.random.default_rng(1)
    named = 0
    for _ in range(100):
        logs = drawn(generator, 10, "normal")
        logs[3] = logs.median() - 1.0  # a bit more than a third of the median
        found = calibration.p_values(logs)
        named += bool(found[3] <= 0.05 and found.argmin() == 3)
    assert named >= 90


def test_several_targets_do_not_hide_each_other(calibration):
    logs = torch.linspace(3.3, 3.7, 10).double()
    logs[[1, 4, 8]] = torch.tensor([1.2, 1.5, 1.4]).double()
    found = calibration.p_values(logs)
    assert set((found <= 0.05).nonzero().flatten().tolist()) == {1, 4, 8}


def test_p_values_do_not_depend_on_the_unit_of_the_scores(calibration):
    logs = torch.linspace(0, 1, 10).double()
    torch.testing.assert_close(calibration.p_values(logs), calibration.p_values(logs + 5))


def test_json_round_trip(tmp_path, calibration, simulated):
    first, second = calibration, replace(simulated(1), detector="other")
    assert Calibration.from_dict(json.loads(json.dumps(first.to_dict()))).models == first.models
    path = tmp_path / "calibration.json"
    write_calibrations(path, [first, second])
    again = read_calibrations(path)
    assert [a.fingerprint for a in again] == [first.fingerprint, second.fingerprint]
    assert len(path.read_text().splitlines()) > 80  # a line per model
    write_calibrations(path, [])
    assert read_calibrations(path) == ()


def test_any_change_changes_the_fingerprint(calibration):
    marks = {
        calibration.fingerprint,
        replace(calibration, sigma0=calibration.sigma0 * 1.01).fingerprint,
        replace(calibration, models=calibration.models[1:]).fingerprint,
    }
    assert len(marks) == 3 and all(len(mark) == 16 for mark in marks)


@pytest.mark.integration
def test_the_stored_numbers_follow_from_the_stored_scores(tmp_path, calibration, simulated):
    """Of a simulated calibration, and of every one that is shipped."""
    write_calibrations(tmp_path / "c.json", [simulated(0, (10, 43))])
    stored = read_calibrations(tmp_path / "c.json")
    path = resources.files("defense_nc") / "calibration.json"
    with resources.as_file(path) as real:
        stored += read_calibrations(real)
    for calibration in stored:
        again = refit(calibration)
        assert again.models == calibration.models
        assert again.sigma0 == pytest.approx(calibration.sigma0, rel=1e-6)
        assert again.nu0 == pytest.approx(calibration.nu0, rel=1e-6)
        assert again.tail == pytest.approx(calibration.tail, rel=1e-6)


def test_load_matches_detector_preset_and_settings(monkeypatch, calibration):
    one = calibration
    monkeypatch.setattr(shipped, "_shipped", lambda: (one,))
    assert load_calibration("test", "tiny") is one
    assert load_calibration("test", settings={"betas": [0.5, 0.9]}) is one
    assert load_calibration("test", settings={"betas": (0.5, 0.9)}) is one
    # Records keep nine digits of a number.
    assert load_calibration("test", settings={"betas": [0.5, 0.9 + 1e-12]}) is one
    assert load_calibration("test", "tiny", settings={"betas": [0.9, 0.9]}) is None
    assert load_calibration("test", "small") is None
    assert load_calibration("other", "tiny") is None


def test_load_prefers_the_calibration_for_as_many_classes(monkeypatch, simulated):
    ten, more = simulated(0, (10,), models=6), simulated(1, (43,), models=6)
    monkeypatch.setattr(shipped, "_shipped", lambda: (ten, more))
    assert load_calibration(ten.detector, classes=10) is ten
    assert load_calibration(ten.detector, classes=43) is more
    assert load_calibration(ten.detector, classes=100) is ten
    assert load_calibration(ten.detector) is ten


def test_peers_are_models_of_the_same_shape(calibration, subject, simulated):
    calibration = simulated(0, (10, 43), models=6)
    assert len(calibration.peers(subject)) == 6
    assert len(calibration.peers(None)) == 12
    assert len(calibration.peers(replace(subject, channels=1))) == 12
    assert len(calibration.peers(replace(subject, network="transformer"))) == 12


def test_a_clean_model_keeps_the_labels_that_were_reached(subject):
    scores, rates = torch.arange(1.0, 11), torch.ones(10)
    rates[0] = 0.5
    kept = clean_model(scores, rates, floor=0.9, subject=subject, dataset="d", arch="a", name="n")
    assert len(kept.log_scores) == 9
    assert kept.log_scores[0] == pytest.approx(math.log(2), abs=1e-6)
    assert kept.level == pytest.approx(math.log(6), abs=1e-6)
    few = clean_model(scores, rates * 0, floor=0.9, subject=subject, dataset="d", arch="a")
    assert few is None


def test_refusals(calibration):
    models = calibration.models
    short = replace(models[0], log_scores=(1.0,))
    flat = [replace(model, log_scores=(1.0,) * 10) for model in models]
    cases = [
        (lambda: fit_calibration(models[:4], detector="d", preset="p"), "5 clean models"),
        (lambda: fit_calibration([*models, short], detector="d", preset="p"), "2 log scores"),
        (lambda: fit_calibration(flat, detector="d", preset="p"), "not all 0"),
        (lambda: fit_prior([0.1], [3.0]), ">= 2"),
        (lambda: fit_prior([0.1, 0.2], [3.0]), "as many"),
        (lambda: fit_prior([0.1, -0.2], [3.0, 3.0]), ">= 0"),
        (lambda: fit_tail(torch.rand(19)), "n >= 20"),
        (lambda: fit_tail(torch.full((20,), 0.5)), "differ"),
        (lambda: moderated_p_values(torch.zeros(1), Prior(0.2, 4.0)), "K >= 2"),
        (lambda: moderated_p_values(torch.zeros(4), Prior(0.0, 4.0)), "sigma > 0"),
        (lambda: replace(calibration, sigma0=0.0), "sigma0"),
        (lambda: replace(calibration, nu0=math.inf), "nu0"),
        (lambda: replace(calibration, tail=Tail(0.1, 0.1, 2.0, 9)), "tail"),
        (lambda: replace(calibration, models=models[:4]), "5 clean models"),
        (lambda: Calibration.from_dict({"detector": "d"}), "fields"),
        (lambda: Calibration.from_dict({**calibration.to_dict(), "more": 1}), "fields"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match="list of calibrations"):
        read_calibrations(tmp_path / "c.json")
