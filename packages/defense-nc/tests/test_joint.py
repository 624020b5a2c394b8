"""Several detectors judged together: Fisher's product, its null, who may be judged with whom."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2, combine_pvalues

from defense_nc.verdict import (
    Calibration,
    Verdict,
    clean_model,
    fit_calibration,
    fit_joint,
    judge,
    judge_together,
    load_calibration,
    panels,
)
from defense_nc.verdict.joint import _nominal

DETECTORS = ("one", "two", "three")


@pytest.fixture(scope="module")
def scores(drawn):
    """Draws a clean model's scores; a label may be made easier by some deviations."""

    def draw(generator, *, label: int = 0, easier: float = 0.0) -> torch.Tensor:
        values = drawn(generator, 10, "normal")
        values[label] -= easier * 0.2
        return values.exp()

    return draw


@pytest.fixture(scope="module")
def calibrations(scores, subject) -> dict[str, Calibration]:
    """Of three detectors on the same forty models, named alike."""
    generator = np.random.default_rng(0)
    nulls = {}
    for detector in DETECTORS:
        models = [
            clean_model(
                scores(generator),
                torch.ones(10),
                floor=0.9,
                subject=subject,
                dataset="noise",
                arch="none",
                name=f"study/clean-{i}",
            )
            for i in range(40)
        ]
        clean = [model for model in models if model is not None]
        nulls[detector] = fit_calibration(clean, detector=detector, preset="tiny")
    return nulls


@pytest.fixture(scope="module")
def scan(scores, subject, calibrations):
    """Reports of all detectors of one model, whose label 3 is easier for each by so much."""

    def reports(generator, *easier: float, works: float = 0.0, rate: float = 1.0):
        return {
            detector: judge(
                detector,
                scores(generator, label=3, easier=by),
                torch.full((10,), rate),
                floor=0.5,
                works=works,
                alpha=0.05 / 3,
                calibration=calibrations[detector],
                subject=subject,
            )
            for detector, by in zip(DETECTORS, easier, strict=True)
        }

    return reports


def test_products_are_fishers():
    p_values = torch.tensor([[0.1, 0.5], [0.02, 0.9], [0.3, 1.0]], dtype=torch.float64)
    joint = _nominal(list(-p_values.log()))
    want = [combine_pvalues(column.numpy()).pvalue for column in p_values.T]
    assert joint.tolist() == pytest.approx(want)
    assert float(joint[0]) == pytest.approx(chi2.sf(-2 * float(p_values[:, 0].log().sum()), 6))


def test_faint_signs_of_one_label_add_up(scan):
    generator, together, alone = np.random.default_rng(1), 0, 0
    for _ in range(20):
        reports = scan(generator, 3.0, 3.0, 3.0)
        joint = judge_together(reports, alpha=0.05)
        together += joint.suspected == (3,)
        alone += any(report.suspected == (3,) for report in reports.values())
    assert together >= 16 and alone < together


def test_a_single_loud_detector_is_enough(scan):
    generator = np.random.default_rng(2)
    for place in range(3):
        easier = [20.0 if i == place else 0.0 for i in range(3)]
        joint = judge_together(scan(generator, *easier), alpha=0.05)
        assert joint.verdict is Verdict.BACKDOORED and joint.suspected == (3,)
        assert "label 3" in joint.reason and joint.p_value == joint.p_values[3]


def test_clean_models_are_accused_at_the_rate(scan):
    generator, draws = np.random.default_rng(3), 400
    joint = [judge_together(scan(generator, 0.0, 0.0, 0.0), alpha=0.05) for _ in range(draws)]
    alarms = sum(one.verdict is Verdict.BACKDOORED for one in joint) / draws
    # Five percent, give or take the draws and forty models' fit.
    assert 0.01 <= alarms <= 0.10


def test_detectors_that_always_agree_are_worth_one(scan, calibrations):
    """Their products are far smaller than independent ones'; the clean models show it."""
    one, generator, draws = calibrations["one"], np.random.default_rng(8), 400
    alarms = 0
    for _ in range(draws):
        report = replace(scan(generator, 0.0, 0.0, 0.0)["one"], calibration=one)
        same = {name: report for name in DETECTORS}
        alarms += judge_together(same, alpha=0.05).verdict is Verdict.BACKDOORED
    assert 0.01 <= alarms / draws <= 0.10


def test_triggers_that_do_not_work_are_no_evidence(scan):
    reports = scan(np.random.default_rng(4), 8.0, 8.0, 8.0, works=0.75, rate=0.6)
    joint = judge_together(reports, alpha=0.05)
    assert not joint.suspected and set(joint.p_values) == {1.0}


def test_an_abstention_stands_where_nothing_is_accused(scan):
    generator = np.random.default_rng(5)
    for easier, verdict in ((0.0, Verdict.INCONCLUSIVE), (20.0, Verdict.BACKDOORED)):
        reports = scan(generator, easier, 0.0, 0.0)
        unsure = replace(reports["two"], verdict=Verdict.INCONCLUSIVE, reason="I cannot say.")
        joint = judge_together({**reports, "two": unsure}, alpha=0.01)
        assert joint.verdict is verdict
        assert ("I cannot say." in joint.reason) == (verdict is Verdict.INCONCLUSIVE)


def test_too_many_labels_give_no_reference(scores, subject, calibrations):
    generator, reports = np.random.default_rng(6), {}
    for detector in DETECTORS:
        values = scores(generator)
        values[:4] *= 0.05
        values[4:] = values[4:].mean()
        reports[detector] = judge(
            detector,
            values,
            torch.ones(10),
            floor=0.5,
            calibration=calibrations[detector],
            subject=subject,
        )
    assert judge_together(reports, alpha=0.05).verdict is Verdict.INCONCLUSIVE


def test_only_detectors_of_the_same_clean_models_are_judged_together(scan, calibrations):
    reports = scan(np.random.default_rng(7), 0.0, 0.0, 0.0)
    assert panels(reports) == [DETECTORS]
    two = calibrations["two"]
    others = replace(two, models=tuple(replace(m, name=f"other/{m.name}") for m in two.models))
    apart = {**reports, "two": replace(reports["two"], calibration=others)}
    assert panels(apart) == [("one", "three"), ("two",)]
    with pytest.raises(ValueError, match="the same clean models"):
        judge_together(apart, alpha=0.05)
    outside = {**reports, "two": replace(reports["two"], calibrated=False)}
    assert panels(outside) == [("one", "three")]
    with pytest.raises(ValueError, match="2 of them calibrated"):
        judge_together(outside, alpha=0.05)
    with pytest.raises(ValueError, match="two or more"):
        judge_together({"one": reports["one"]}, alpha=0.05)


def test_models_whose_labels_are_not_known_count_for_nothing(calibrations):
    first, second = (
        replace(c, models=tuple(replace(m, labels=None) for m in c.models))
        for c in (calibrations["one"], calibrations["two"])
    )
    assert fit_joint(first, second) is None
    assert fit_joint(calibrations["one"], calibrations["two"]) is not None


def test_those_of_an_audit_ship_with_the_same_models():
    of_audit = [load_calibration(name, "fast") for name in ("head", "uap", "sweep", "warp")]
    joint = fit_joint(*(c for c in of_audit if c is not None))
    assert joint is not None and len(joint.calibrations) == 4
    assert joint.tail.exponent == 1.0  # no heavier than independent detectors'
