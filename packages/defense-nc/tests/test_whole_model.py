"""The whole model: the line by hand, the rate on clean models, a trigger for every label."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import linregress, t

from defense_nc.verdict import (
    Verdict,
    clean_model,
    fit_calibration,
    judge,
    judge_together,
    load_calibration,
)
from defense_nc.verdict.whole_model import _below_the_line, fit_whole_model, whole_model_p_value

KINDS = ("a", "b", "c", "d")


def levels(generator, kind, count=1):
    """How easily networks of a kind are fooled, by patches and by pictures: together."""
    easy = 0.3 * KINDS.index(kind) + 0.1 * generator.standard_normal(count)
    return easy, 2 * easy - 1 + 0.05 * generator.standard_normal(count)


def scores(generator, level):
    values = level + 0.1 * generator.standard_normal(10)
    return torch.from_numpy(values - np.median(values) + level).exp()


def clean(scores, subject, kind, name):
    model = clean_model(
        scores, torch.ones(10), floor=0.9, subject=subject, dataset="noise", arch=kind, name=name
    )
    assert model is not None
    return model


@pytest.fixture(scope="module")
def calibrations(subject):
    generator, models = np.random.default_rng(0), {"sweep": [], "uap": []}
    for kind in KINDS:
        for i in range(10):
            for detector, (level,) in zip(models, levels(generator, kind), strict=True):
                one = scores(generator, level)
                models[detector].append(clean(one, subject, kind, f"{kind}-{i}"))
    return {name: fit_calibration(m, detector=name, preset="tiny") for name, m in models.items()}


def reports(generator, calibrations, subject, *, kind="b", easier=0.0):
    found = {}
    for detector, (level,) in zip(("sweep", "uap"), levels(generator, kind), strict=True):
        lower = level - (easier if detector == "uap" else 0.0)
        found[detector] = judge(
            detector,
            scores(generator, lower),
            torch.ones(10),
            floor=0.9,
            calibration=calibrations[detector],
            subject=subject,
        )
    return found


def test_the_line_is_that_of_least_squares(calibrations, subject):
    null = fit_whole_model(calibrations["uap"], calibrations["sweep"])
    assert null is not None
    x, y = ([pair[i].level for pair in null.pairs] for i in (1, 0))
    line, n = linregress(x, y), len(x)
    residuals = np.array(y) - line.intercept - line.slope * np.array(x)
    spread = ((np.array(x) - np.mean(x)) ** 2).sum()
    deviation = (residuals @ residuals / (n - 2)) ** 0.5
    for level, other in ((-1.5, 0.4), (0.0, 0.4), (-9.0, 2.0)):
        wide = deviation * (1 + 1 / n + (other - np.mean(x)) ** 2 / spread) ** 0.5
        want = t.cdf((level - line.intercept - line.slope * other) / wide, n - 2)
        assert _below_the_line(level, other, subject, null.pairs) == pytest.approx(want, rel=1e-6)


def test_a_line_does_not_fall(subject):
    generator = np.random.default_rng(1)
    rising = [
        (
            clean(scores(generator, -0.2 * i), subject, "a", f"{i}"),
            clean(scores(generator, 0.2 * i), subject, "a", f"{i}"),
        )
        for i in range(12)
    ]
    low = _below_the_line(-2.0, 0.0, subject, rising)
    assert low == pytest.approx(_below_the_line(-2.0, 2.2, subject, rising), rel=1e-6)


def test_clean_models_are_accused_at_the_rate(calibrations, subject):
    generator, p_values = np.random.default_rng(2), []
    for i in range(300):
        found = reports(generator, calibrations, subject, kind=KINDS[i % 4])
        p = whole_model_p_value([*found.values()], [*calibrations.values()])
        assert p is not None
        p_values.append(p)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08
    assert min(p_values) > 1e-4


def test_easy_labels_of_one_detector_alone_are_a_backdoor(calibrations, subject):
    generator = np.random.default_rng(3)
    found = reports(generator, calibrations, subject, easier=3.0)
    joint = judge_together(found, alpha=0.05)
    assert joint.verdict is Verdict.BACKDOORED and joint.suspected == ()
    assert joint.of_whole_model and "No single label" in joint.reason
    assert joint.to_dict()["whole_model"] == joint.whole_model
    assert joint.whole_model is not None and joint.p_value == joint.whole_model / 0.02
    # As easy for patches: it is the network that is easy to fool.
    fragile = {"uap": found["uap"], "sweep": judge_at(generator, -1.0, calibrations, subject)}
    assert judge_together(fragile, alpha=0.05).verdict is not Verdict.BACKDOORED
    # A label that stands out as well is named.
    low = torch.tensor([label.score for label in found["uap"].labels]).double()
    low[3] /= 50
    named = {"uap": judge_low(low, calibrations, subject), "sweep": found["sweep"]}
    assert judge_together(named, alpha=0.05).suspected == (3,)


def judge_at(generator, level, calibrations, subject):
    values = scores(generator, level)
    return judge_low(values, calibrations, subject, "sweep")


def judge_low(values, calibrations, subject, detector="uap"):
    return judge(
        detector,
        values,
        torch.ones(10),
        floor=0.9,
        calibration=calibrations[detector],
        subject=subject,
    )


def test_who_gets_no_answer(calibrations, subject):
    uap, sweep = calibrations["uap"], calibrations["sweep"]
    assert fit_whole_model(uap, replace(sweep, models=sweep.models[:19])) is None
    one_kind = [replace(model, arch="a") for model in uap.models]
    assert fit_whole_model(replace(uap, models=tuple(one_kind)), sweep) is None
    found = reports(np.random.default_rng(4), calibrations, subject)
    assert whole_model_p_value([found["uap"]], [uap]) is None
    nothing = judge("uap", torch.ones(10), torch.zeros(10), floor=0.9, subject=subject)
    assert whole_model_p_value([nothing, found["sweep"]], [uap, sweep]) == 1.0


def test_what_ships_can_judge_whole_models():
    nulls = [load_calibration(name, "fast", classes=10) for name in ("uap", "sweep")]
    assert all(nulls) and fit_whole_model(*nulls) is not None  # type: ignore[arg-type]
