"""Where a scan cannot answer, it says so and why; on planted models where that is affordable."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defense_nc import NCConfig, NeuralCleanse, Verdict, judge
from defense_nc.verdict import calibration as shipped
from defense_nc.verdict.model_info import ModelInfo, describe_model
from defense_nc.verdict.report import judge_scan
from wm_victim.toy_backdoors import planted_classifier, planted_images

SUBJECT = ModelInfo(classes=10, image_size=32, channels=3, network="convolutional", images=500)

CLEAN = torch.linspace(3.3, 3.7, 10).double()
FAST = NCConfig.preset("fast")


@pytest.fixture(scope="module")
def data():
    return planted_images(200)


def told(calibration, logs, rates=None, **changes):
    rates = torch.ones(len(logs)) if rates is None else rates
    settings = {"floor": 0.9, "calibration": calibration, "subject": SUBJECT}
    return judge("test", logs.exp(), rates, **{**settings, **changes})


def rejudged(report, **changes):
    """By the scan's own scores: the shipped calibration does not cover images of 16 pixels."""
    scores = torch.tensor([label.score for label in report.labels]).double()
    rates = torch.tensor([label.success_rate for label in report.labels]).double()
    return judge("neural-cleanse", scores, rates, floor=0.9, **changes)


def lowered(*labels, by=2.0):
    logs = CLEAN.clone()
    logs[list(labels)] -= by
    return logs


def test_within_the_limits(calibration):
    clean, bad = told(calibration, CLEAN), told(calibration, lowered(2))
    assert (clean.verdict, bad.verdict) == (Verdict.CLEAN, Verdict.BACKDOORED)
    assert clean.calibrated and bad.calibrated
    assert bad.suspected == (2,)
    assert bad.p_value == bad.labels[2].p_value <= 0.05
    out = bad.to_dict()
    assert out["calibrated"] and out["calibration"] == calibration.fingerprint
    assert out["subject"]["network"] == "convolutional"


def test_alpha_is_the_rule(calibration):
    logs = lowered(2, by=0.9)
    p = told(calibration, logs).p_value
    assert told(calibration, logs, alpha=p * 1.01).suspected == (2,)
    assert told(calibration, logs, alpha=p * 0.99).suspected == ()
    # Half of the median is no part of the calibrated rule.
    assert told(calibration, logs, alpha=p * 1.01, max_ratio=0.01).suspected == (2,)


@pytest.mark.parametrize("count", [2, 3])
def test_two_or_three_classes_need_a_calibration(calibration, count):
    clean, bad = (told(calibration, logs[:count], subject=None) for logs in (CLEAN, lowered(1)))
    assert (clean.verdict, bad.verdict) == (Verdict.CLEAN, Verdict.BACKDOORED)
    assert bad.suspected == (1,)
    report = told(None, lowered(1)[:count], subject=None)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert f"Among {count} classes" in report.reason


@pytest.mark.parametrize("count", [2, 3])
def test_all_of_two_or_three_labels_must_be_reached(calibration, count):
    rates = torch.tensor([1.0, 0.5, 1.0])[:count]
    report = told(calibration, lowered(0)[:count], rates, subject=None)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert f"Only {count - 1} of {count}" in report.reason


def test_too_few_labels_reached(calibration):
    rates = torch.tensor([1.0] * 4 + [0.0] * 6)
    report = told(calibration, CLEAN, rates)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "Only 4 of 10" in report.reason
    # What was not reached hides nothing that stands out already.
    assert told(calibration, lowered(0), rates).suspected == (0,)


def test_several_targets_are_all_named(calibration):
    report = told(calibration, lowered(1, 5, 8))
    assert report.verdict is Verdict.BACKDOORED
    assert report.suspected == (1, 5, 8)
    assert all(f"label {label} " in report.reason for label in (1, 5, 8))


def test_more_than_a_third_is_too_many(calibration):
    report = told(calibration, lowered(1, 3, 5, 8))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.suspected == (1, 3, 5, 8)
    assert "Too many labels stand out (4 of 10)" in report.reason


def test_half_of_the_labels_fall_apart(calibration):
    report = told(calibration, lowered(0, 1, 2, 3, 4))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "Too many labels stand out (5 of 10)" in report.reason
    report = told(calibration, 1.7 + lowered(0, 1, 2, 3, 4, 5))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "two groups" in report.reason


def test_every_label_easy(calibration, subtests):
    for easy in [range(10), range(9), range(7)]:
        with subtests.test(easy=easy):
            report = told(calibration, lowered(*easy, by=1.5))
            assert report.verdict is Verdict.INCONCLUSIVE
            assert "Every label is easy" in report.reason


def test_a_little_easier_than_clean_models_is_no_reason_to_doubt(calibration):
    lowest = min(model.level for model in calibration.models)
    assert told(calibration, CLEAN - 3.5 + lowest - 0.05).verdict is Verdict.CLEAN


def test_without_a_calibration_an_easy_level_cannot_be_seen():
    assert told(None, lowered(*range(10))).verdict is Verdict.CLEAN


def test_outside_the_calibrated_range(calibration, subtests):
    for change, reason in [
        ({"classes": 11}, "10 classes; here there are 11"),
        ({"image_size": 64}, "32 pixels a side; here there are 64"),
        ({"channels": 1}, "images of 3 channels; these have 1"),
        ({"network": "transformer"}, "this one is transformer"),
        ({"network": "other"}, "neither convolutional nor a transformer"),
        ({"images": 200}, "500 clean images to scan with; here there are 200"),
    ]:
        with subtests.test(change=change, reason=reason):
            subject = replace(SUBJECT, **change)
            report = told(calibration, lowered(2), subject=subject)
            assert report.verdict is Verdict.INCONCLUSIVE
            assert not report.calibrated
            assert report.suspected == (2,)  # at face value
            assert reason in report.reason and "label 2" in report.reason
            assert told(calibration, CLEAN, subject=subject).verdict is Verdict.INCONCLUSIVE


def test_numbers_between_the_calibrated_ones_are_covered(calibration, simulated):
    calibration = simulated(0, (10, 43), models=6)
    logs = torch.linspace(3.3, 3.7, 20).double()
    report = told(calibration, logs, subject=replace(SUBJECT, classes=20, images=300))
    assert report.verdict is Verdict.CLEAN and report.calibrated


def test_a_clean_verdict_says_what_was_not_looked_for(calibration):
    for report in (told(calibration, CLEAN), told(None, CLEAN)):
        assert report.verdict is Verdict.CLEAN
        assert "an image's own class were not looked for" in report.reason


class Attention(nn.Module):
    """Only its name matters."""


class Compiled(nn.Module):
    """A compiled module has lost its class."""

    original_name = "Conv2d"


def test_the_kind_of_network_is_read_off_its_layers(subtests):
    for part, network in [
        (nn.Conv2d(3, 4, 3), "convolutional"),
        (Compiled(), "convolutional"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2)), "transformer"),
        (Attention(), "transformer"),
        (nn.Linear(3, 4), "other"),
    ]:
        with subtests.test(part=part, network=network):
            model = nn.ModuleList([part])
            found = describe_model(model, torch.zeros(5, 3, 8, 12), classes=7)
            assert found == ModelInfo(7, 12, 3, network, 5)


def test_the_number_of_classes_is_asked_of_the_model(data):
    model = planted_classifier().train()
    assert describe_model(model, data.images) == ModelInfo(10, 16, 3, "convolutional", 200)
    assert model.training


def test_judge_scan_finds_the_calibration_of_its_settings(calibration, data, monkeypatch):
    monkeypatch.setattr(shipped, "_shipped", lambda: (calibration,))
    model, scores = planted_classifier("clean"), CLEAN.exp()

    def told_by(settings):
        return judge_scan(
            "test",
            scores,
            torch.ones(10),
            model=model,
            images=data.images,
            settings=settings,
            floor=0.9,
        )

    held = told_by({"betas": (0.5, 0.9)})
    assert "32 pixels a side; here there are 16" in held.reason
    assert held.config["images"] == 200
    other = told_by({"betas": (0.9, 0.9)})
    assert other.calibration is None and other.verdict is Verdict.INCONCLUSIVE
    assert other.reason == held.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["source-specific", "all-to-all"])
def test_a_class_bound_trigger_is_not_seen_and_the_report_says_so(kind, data):
    """The fixtures' tests show that these backdoors work; Neural Cleanse reverses none of them."""
    model = planted_classifier(kind, target=3)
    report = NeuralCleanse(FAST).scan(model, data.images, labels=data.labels, progress=False)
    assert report.suspected == ()
    own = rejudged(report)
    assert own.verdict is Verdict.CLEAN and own.suspected == ()
    assert "were not looked for" in own.reason


@pytest.mark.slow
def test_several_planted_targets_are_named(calibration, data):
    """By a calibration; the scan's own scores do not suffice, as the targets hide each other."""
    model = planted_classifier("several", target=3)
    report = NeuralCleanse(FAST).scan(model, data.images, labels=data.labels, progress=False)
    calibrated = rejudged(report, calibration=calibration)
    assert calibrated.suspected == (3, 4, 5)
    assert calibrated.verdict is Verdict.BACKDOORED


def test_refused_subjects(subtests):
    for change, message in [
        ({"classes": 1}, "classes"),
        ({"image_size": 0}, "image_size"),
        ({"channels": 0}, "channels"),
        ({"images": 0}, "images"),
        ({"network": "recurrent"}, "network"),
    ]:
        with subtests.test(change=change, message=message):
            with pytest.raises(ValueError, match=message):
                replace(SUBJECT, **change)
            with pytest.raises(ValueError, match="shape"):
                describe_model(nn.Linear(2, 2), torch.zeros(3, 8), classes=2)
