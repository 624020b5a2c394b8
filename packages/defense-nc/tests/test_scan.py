"""A scan names the planted label and nothing in the clean control, and leaves the model alone."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from defense_nc import NCConfig, NeuralCleanse, Verdict, invert_trigger, judge
from wm_inject.core.images import quantize
from wm_inject.core.resume import ResumeFile
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3
# The planted models are smaller than anything the preset "fast" was calibrated on.
FAST = NCConfig.preset("fast", steps=60)
TINY = NCConfig.preset("fast", steps=2, batches=1)


@pytest.fixture(scope="module")
def data():
    return planted_images(200)


def scanned(kind, data):
    model = planted_classifier(kind, target=TARGET)
    return NeuralCleanse(FAST).scan(model, data.images, labels=data.labels, progress=False)


@pytest.fixture(scope="module")
def backdoored(data):
    return scanned("patch", data)


@pytest.mark.integration
def test_the_planted_patch_is_named(backdoored):
    assert backdoored.suspected == (TARGET,)
    scores = [label.score for label in backdoored.labels]
    assert min(scores) == scores[TARGET]
    assert f"label {TARGET}" in backdoored.reason
    rates = [label.success_rate for label in backdoored.labels]
    own = judge("test", torch.tensor(scores), torch.tensor(rates), floor=backdoored.floor)
    assert own.verdict is Verdict.BACKDOORED and own.suspected == (TARGET,)


@pytest.mark.integration
def test_a_model_smaller_than_the_calibrated_ones_is_told_so(data, backdoored):
    """No setting states an error rate where none was measured, with a calibration or without."""
    model = planted_classifier("patch", target=TARGET)
    fast = NeuralCleanse().scan(model, data.images, labels=data.labels, progress=False)
    assert fast.config["name"] == "fast" and backdoored.config["name"] == "fast*"
    for report in (fast, backdoored):
        assert not report.calibrated and report.suspected == (TARGET,)
        assert report.verdict is Verdict.INCONCLUSIVE and "16" in report.reason


@pytest.mark.integration
def test_nothing_is_named_in_the_clean_control(data):
    clean = scanned("clean", data)
    # One clean label comes out a little low here, and without a calibration that may be doubted.
    assert clean.verdict is not Verdict.BACKDOORED
    assert clean.suspected == () and clean.p_value > 0.01
    assert sum(label.converged for label in clean.labels) >= 8


@pytest.mark.integration
def test_a_channel_shift_has_no_small_mask(data):
    """Neural Cleanse is not made for it: the target is no cheaper than other labels.

    The planted channel shift is real (it flips every image), so this is a miss, and a known one.
    """
    model = planted_classifier("channel", target=TARGET)
    others = data.images[data.labels != TARGET]
    with torch.no_grad():
        flipped = model(quantize(planted_trigger("channel")(others))).argmax(1) == TARGET
    assert flipped.float().mean() > 0.99
    norms = [
        invert_trigger(model, data.images, label, config=FAST, labels=data.labels).l1_norm
        for label in (TARGET, 5, 7)
    ]
    assert norms[0] > 0.5 * sum(norms[1:]) / 2


@pytest.mark.integration
def test_the_report_holds_everything(backdoored, data):
    assert backdoored.detector == "neural-cleanse"
    assert [label.label for label in backdoored.labels] == list(range(10))
    assert sorted(backdoored.triggers) == list(range(10))
    for label in backdoored.labels:
        trigger = backdoored.triggers[label.label]
        gain = backdoored.log["race_log"]["gain"][label.label]
        assert label.score == pytest.approx(trigger.l1_norm * gain)
        assert label.success_rate == trigger.success_rate
        assert trigger.target == label.label
        assert label.converged == (label.success_rate >= FAST.floor)
    assert backdoored.config["images"] == len(data)
    assert backdoored.config["steps"] == FAST.steps
    assert backdoored.config["name"] == "fast*"
    assert sum(left is None for left in backdoored.log["race_log"]["left_at"]) <= 6
    json.dumps(backdoored.to_dict(), allow_nan=False)
    assert math.isfinite(backdoored.paper_index)
    assert str(backdoored.verdict) == backdoored.to_dict()["verdict"] == "inconclusive"


def test_the_model_comes_back_as_it_was(data):
    model = planted_classifier("patch").train()
    model.body[1].eval()
    model.gain.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    NeuralCleanse(TINY).scan(model, data.images, progress=False, device="cpu")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not model.body[1].training
    assert not model.gain.requires_grad and model.body[0].weight.requires_grad


@pytest.mark.integration
def test_same_seed_same_report_and_no_labels_needed(data):
    model = planted_classifier("patch", num_classes=4)
    images = planted_images(60, num_classes=4).images
    first = NeuralCleanse(TINY).scan(model, images, seed=2, progress=False)
    assert first == NeuralCleanse(TINY).scan(model, images, seed=2, progress=False)
    assert first != NeuralCleanse(TINY).scan(model, images, seed=3, progress=False)
    assert first.seed == 2


def test_two_classes_cannot_be_compared():
    data = planted_images(40, num_classes=2)
    model = planted_classifier("patch", num_classes=2)
    report = NeuralCleanse(TINY).scan(model, data.images, labels=data.labels, progress=False)
    assert report.verdict is Verdict.INCONCLUSIVE


@pytest.mark.integration
def test_one_label_at_a_time_is_still_there(data):
    """Without a race and in float32, both engines give the same report."""
    model = planted_classifier("patch", num_classes=4, target=1)
    images = planted_images(60, num_classes=4).images
    exact = NCConfig.preset("fast", steps=14, race=False, precision="float32")
    stacked = NeuralCleanse(exact).scan(model, images, progress=False)
    single = NeuralCleanse(replace(exact, engine="single")).scan(model, images, progress=False)
    scores = [[label.score for label in report.labels] for report in (stacked, single)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)
    assert stacked.suspected == single.suspected and stacked.verdict is single.verdict


@pytest.mark.integration
def test_a_checkpoint_changes_nothing_and_is_gone_afterwards(data, tmp_path):
    model, path = planted_classifier("patch"), tmp_path / "scan.safetensors"
    kept = NeuralCleanse(TINY).scan(model, data.images, progress=False, checkpoint=path)
    assert kept == NeuralCleanse(TINY).scan(model, data.images, progress=False)
    assert not path.exists()


def test_one_label_at_a_time_continues_from_its_checkpoint(tmp_path, monkeypatch):
    model = planted_classifier("patch", num_classes=4)
    images, path = planted_images(60, num_classes=4).images, tmp_path / "scan.safetensors"
    detector = NeuralCleanse.preset("reference", steps=2, batches=1)
    whole = detector.scan(model, images, progress=False)
    save = ResumeFile.save

    def killed(self, state):
        save(self, state)
        if len(state) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        detector.scan(model, images, progress=False, checkpoint=path)
    monkeypatch.setattr(ResumeFile, "save", save)
    again = detector.scan(model, images, progress=False, checkpoint=path)
    assert again == whole and not path.exists()
    for label, trigger in whole.triggers.items():
        assert torch.equal(trigger.mask, again.triggers[label].mask)


def test_refusals(data):
    model, images = planted_classifier("patch"), data.images
    cases = [
        (images[0], {}, "shape"),
        (images.half(), {}, "float32"),
        (images - 1, {}, r"\[0, 1\]"),
        (images[:0], {}, "empty"),
        (images, {"labels": data.labels[:3]}, "labels"),
        (images, {"labels": data.labels + 1}, "labels in 0"),
        (images, {"labels": torch.zeros_like(data.labels)}, "two classes"),
    ]
    for wrong, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            NeuralCleanse(TINY).scan(model, wrong, progress=False, **settings)
    with pytest.raises(ValueError, match="logits"):
        NeuralCleanse(TINY).scan(nn.Identity(), images, progress=False)
    for wrong in ({"alpha": 0.0}, {"max_ratio": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NeuralCleanse(TINY, **wrong)
