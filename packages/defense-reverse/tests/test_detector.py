from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from defense_nc import Verdict, judge
from defense_reverse import ReverseConfig, ReversedTrigger, ReverseGenerator, detection_case

TARGET = 2
TINY = ReverseConfig.preset("fast", width=2, depth=1, pretrain_steps=1, steps=2, lr=1e-4)


def scan(model, images, *, alpha=0.05, max_ratio=0.5, **options):
    return ReverseGenerator(TINY, alpha, max_ratio).scan(model, images, progress=False, **options)


def own_verdict(report):
    """By its own scores: no calibration covers six classes and images of 16 pixels."""
    scores, rates = (
        torch.tensor([getattr(label, name) for label in report.labels])
        for name in ("score", "success_rate")
    )
    assert report.verdict is Verdict.INCONCLUSIVE
    return judge("test", scores, rates, floor=report.floor).verdict


@pytest.mark.integration
def test_the_channel_shift_is_named_and_has_the_smallest_residual(backdoored, quick):
    report = backdoored.report
    scores = [label.score for label in report.labels]
    assert scores.index(min(scores)) == TARGET
    assert own_verdict(report) is Verdict.BACKDOORED and report.suspected == (TARGET,)
    assert TARGET in report.paper_flagged and report.paper_index > 2
    # residuals are compared at one success floor
    assert all(label.success_rate >= quick.success_floor for label in report.labels)


@pytest.mark.integration
def test_the_clean_control_names_nothing(clean):
    assert own_verdict(clean.report) is Verdict.CLEAN and clean.report.suspected == ()


@pytest.mark.integration
def test_the_report_can_be_written_and_carries_a_trigger_per_label(backdoored, data, quick):
    report = backdoored.report
    text = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert text["verdict"] == "inconclusive" and text["suspected"] == [TARGET]
    assert len(text["labels"]) == 6
    assert text["config"]["lambdas"] == list(quick.lambdas) and text["config"]["images"] == 128
    assert report.detector == "reverse-generator" and set(report.triggers) == set(range(6))
    for label, trigger in report.triggers.items():
        assert isinstance(trigger, ReversedTrigger) and trigger.target == label
        assert trigger(data[0]).shape == data[0].shape


@pytest.mark.integration
def test_the_model_comes_back_as_it_was(data, channel_model):
    images, labels = data
    channel_model.train()
    channel_model.body.eval()
    state = copy.deepcopy(channel_model.state_dict())
    scan(channel_model, images, labels=labels, device="cpu")
    scan(channel_model, images, labels=labels)
    assert channel_model.training and not channel_model.body.training
    assert all(p.requires_grad and p.grad is None for p in channel_model.parameters())
    assert all(torch.equal(state[k], v) for k, v in channel_model.state_dict().items())


@pytest.mark.integration
def test_the_same_seed_gives_the_same_report(data, channel_model):
    images, labels = data
    one, same, other = (scan(channel_model, images, labels=labels, seed=seed) for seed in (0, 0, 1))
    assert one.to_dict() == same.to_dict() and one.to_dict() != other.to_dict()


@pytest.mark.integration
def test_labels_are_guessed_where_none_are_given(data, channel_model):
    images, _ = data
    with torch.no_grad():
        answers = channel_model(images).argmax(1)
    told = scan(channel_model, images, labels=answers)
    assert told.to_dict() == scan(channel_model, images).to_dict()


def test_a_budget_too_small_is_inconclusive_and_not_clean(data, channel_model):
    images, labels = data
    report = scan(channel_model, images, labels=labels)
    assert not any(label.converged for label in report.labels)
    assert report.verdict is Verdict.INCONCLUSIVE


def test_bad_input_is_refused(data, channel_model):
    images, labels = data
    for broken in (images[:0], images[0], images.double(), images + 1):
        with pytest.raises(ValueError, match="expected"):
            scan(channel_model, broken)
    for wrong in (labels[:-1], labels.float(), labels + 6):
        with pytest.raises(ValueError, match="expected labels"):
            scan(channel_model, images, labels=wrong)
    with pytest.raises(ValueError, match="at least two classes"):
        scan(channel_model, images, labels=torch.zeros_like(labels))
    for settings in ({"alpha": 0.0}, {"alpha": 1.0}, {"max_ratio": 0.0}, {"max_ratio": 1.5}):
        with pytest.raises(ValueError, match=r"expected (alpha|max_ratio)"):
            scan(channel_model, images, **settings)
    with pytest.raises(ValueError, match="logits"):
        scan(nn.Identity(), images)


def test_the_four_cases_of_the_paper(subtests):
    for flagged, case in [((4,), 1), ((4, 0), 2), ((0, 4, 9), 2), ((0,), 3), ((0, 9), 3), ((), 4)]:
        with subtests.test(flagged=flagged, case=case):
            assert detection_case(flagged, 4) == case
            assert detection_case(set(flagged), 4) == case


def test_negative_labels_have_no_case():
    for flagged, target in (((0,), -1), ((-2,), 0)):
        with pytest.raises(ValueError, match="labels >= 0"):
            detection_case(flagged, target)


def test_presets_and_settings():
    detector = ReverseGenerator.preset("fast", alpha=0.1, steps=7)
    assert (detector.config.name, detector.config.steps, detector.alpha) == ("fast*", 7, 0.1)
    assert ReverseGenerator.preset() == ReverseGenerator()
    assert json.loads(json.dumps(detector.settings)) == detector.settings
    with pytest.raises(ValueError, match="preset"):
        ReverseGenerator.preset("slow")
