"""FeatureRE and BTI-DBF on a channel shift that goes through the features, and on a control."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from defense_nc import Verdict
from defense_nc.protocols import Repaired
from defense_reverse.detectors import BtiDbf, FeatureRE, FeatureTrigger
from defense_reverse.detectors.bti_dbf import invert
from defense_reverse.detectors.bti_losses import BtiDbfConfig
from defense_reverse.detectors.common import open_split
from defense_reverse.detectors.feature_losses import FeatureREConfig, mask_bound
from defense_reverse.mitigations import BtiDbfUnlearning
from wm_inject import quantize

TARGET = 2
FRE = FeatureREConfig(width=4, depth=1, lr=2e-2, steps=60)
BTI = BtiDbfConfig(width=4, depth=1, steps=120, mask_steps=150)
DETECTORS = [
    pytest.param(
        FeatureRE.preset("fast", width=2, depth=1, warmup_steps=1, steps=2), id="feature-re"
    ),
    pytest.param(BtiDbf.preset("fast", width=2, depth=1, steps=2, mask_steps=2), id="bti-dbf"),
]
SIZE = 10.0  # of the gate's features when it is open


class Gated(nn.Module):
    """A planted classifier whose gate is one more channel of its last map."""

    def __init__(self, planted: nn.Module) -> None:
        super().__init__()
        self.planted = planted

    def features(self, images):
        maps = self.planted.body[:-2](images)  # (N, 32, 6, 6)
        drive = ((images - 0.5) * self.planted.template).sum(dim=(1, 2, 3))
        gate = torch.sigmoid(self.planted.slope * (drive - self.planted.threshold))
        gate = SIZE * self.planted.gain * gate
        return torch.cat([maps, gate[:, None, None, None].expand(-1, 1, *maps.shape[2:])], dim=1)

    def head(self, features):
        gate = features[:, -1].mean((1, 2)) / SIZE
        return self.planted.body[-2:](features[:, :-1]) + gate[:, None] * self.planted.added

    def forward(self, images):
        return self.head(self.features(images))


def gated(planted: nn.Module, *, obeys: bool = True) -> Gated:
    model = Gated(copy.deepcopy(planted))
    if not obeys:
        with torch.no_grad():
            model.planted.gain.zero_()
    return model


@pytest.fixture
def model(channel_model) -> Gated:
    return gated(channel_model)


@pytest.mark.integration
def test_feature_re_names_the_channel_shift_and_keeps_its_bounds(model, data):
    images, labels = data
    report = FeatureRE(FRE).scan(model, images, labels=labels, progress=False)
    raw = [entry["score"] for entry in report.log["raw"]]
    assert raw.index(min(raw)) == TARGET and raw[TARGET] < FRE.threshold
    assert report.verdict is Verdict.BACKDOORED and report.suspected == (TARGET,)
    assert f"label {TARGET}" in report.reason and report.detector == "feature-re"
    assert [label.score for label in report.labels] == pytest.approx(torch.tensor(raw).exp())
    found, trigger = report.log["raw"][TARGET], report.triggers[TARGET]
    assert found["change"] <= FRE.image_bound * 1.05 and found["success"] >= FRE.success_floor
    assert found["spread"] <= FRE.spread_bound
    assert isinstance(trigger, FeatureTrigger) and trigger.score == raw[TARGET]
    assert trigger.mask.min() >= 0 and trigger.mask.max() <= 1
    assert found["mask_norm"] <= mask_bound(trigger.mask, FRE) * 1.05
    # among 33 channels, it takes over the gate's
    assert trigger.mask.mean((1, 2)).argmax() == 32
    others = images[labels != TARGET]
    sent = model(quantize(trigger(others))).argmax(1) == TARGET
    assert float(sent.double().mean()) == pytest.approx(trigger.success_rate)
    assert trigger.config["mask"] == [33, 6, 6]


@pytest.mark.integration
def test_feature_re_names_nothing_in_the_clean_control(channel_model, data):
    clean = gated(channel_model, obeys=False)
    report = FeatureRE(FRE).scan(clean, data[0], labels=data[1], progress=False)
    assert report.verdict is Verdict.CLEAN and report.suspected == ()
    assert "names no label" in report.reason


@pytest.mark.integration
def test_bti_dbf_names_the_channel_shift_and_keeps_its_bounds(model, data):
    images, labels = data
    report = BtiDbf(BTI).scan(model, images, labels=labels, progress=False)
    assert report.verdict is Verdict.BACKDOORED and report.suspected == (TARGET,)
    assert report.labels[TARGET].success_rate >= BTI.min_share
    scores = [label.score for label in report.labels]
    assert scores.index(min(scores)) == TARGET and min(scores) > 0
    assert report.log["raw"]["image"] <= BTI.image_bound * 1.05
    assert report.log["raw"]["benign"] <= BTI.benign_bound
    assert set(report.triggers) == {TARGET}
    assert report.triggers[TARGET](images).shape == images.shape


@pytest.mark.integration
def test_bti_dbf_parts_what_the_clean_answer_rests_on(model, data):
    images, labels = data
    with open_split(model, images, labels=labels) as inputs:
        mask = invert(inputs, BtiDbfConfig(width=2, depth=1, steps=1), seed=0).mask
    assert mask.min() >= 0 and mask.max() <= 1
    with torch.no_grad():
        features = model.features(images)
        kept, rest = (model.head(m * features).argmax(1) == labels for m in (mask, 1 - mask))
    # among six classes, a guess is right one time in six
    assert kept.float().mean() > 0.75 and rest.float().mean() < 1 / 6


@pytest.mark.integration
def test_bti_dbf_names_nothing_where_too_few_images_reach_a_label(channel_model, data):
    clean = gated(channel_model, obeys=False)
    report = BtiDbf(BTI).scan(clean, data[0], labels=data[1], progress=False)
    assert report.verdict is Verdict.CLEAN and "less than 0.9" in report.reason


@pytest.mark.integration
def test_the_sigmoid_generator_learns_to_keep_the_images_first(model, data):
    config = BtiDbfConfig(
        width=4, depth=1, residual=False, pretrain_steps=60, steps=1, mask_steps=1, lr=5e-3
    )
    with open_split(model, data[0], labels=data[1]) as inputs:
        inverted = invert(inputs, config, seed=0)
    assert float(inverted.changes.image) < 0.3


@pytest.mark.integration
@pytest.mark.parametrize("detector", DETECTORS)
def test_the_model_comes_back_as_it_was(detector, model, data):
    model.train()
    model.planted.body.eval()
    state = copy.deepcopy(model.state_dict())
    for device in ("cpu", None):
        detector.scan(model, data[0], labels=data[1], progress=False, device=device)
    assert model.training and not model.planted.body.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.integration
@pytest.mark.parametrize("detector", DETECTORS)
def test_the_same_seed_gives_the_same_report(detector, model, data):
    state = torch.get_rng_state()
    one, same, other = (
        detector.scan(model, data[0], labels=data[1], seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    text = json.dumps(one.to_dict(), allow_nan=False)
    assert text == json.dumps(same.to_dict()) != json.dumps({**other.to_dict(), "seed": 0})


@pytest.mark.parametrize("detector", DETECTORS)
def test_bad_input_is_refused(detector, model, data):
    images, labels = data
    for broken in (images[:0], images[0], images.double(), images + 1):
        with pytest.raises(ValueError, match="expected"):
            detector.scan(model, broken, progress=False)
    for wrong in (labels[:-1], labels.float(), labels + 6):
        with pytest.raises(ValueError, match="expected labels"):
            detector.scan(model, images, labels=wrong, progress=False)
    with pytest.raises(ValueError, match="at least two classes"):
        detector.scan(model, images, labels=torch.zeros_like(labels), progress=False)
    with pytest.raises(ValueError, match="expected alpha"):
        replace(detector, alpha=0.0)
    with pytest.raises(ValueError, match="logits"):
        detector.scan(nn.Identity(), images, progress=False)
    with pytest.raises(ValueError, match="features and head"):
        detector.scan(model.planted, images, progress=False)


@pytest.mark.integration
def test_a_feature_trigger_outside_its_range_is_refused(model, data):
    config = FeatureREConfig(width=2, depth=1, steps=1)
    report = FeatureRE(config).scan(model, data[0], labels=data[1], progress=False)
    trigger = report.triggers[0]
    with pytest.raises(ValueError, match="expected a target >= 0"):
        FeatureTrigger(trigger.generator, trigger.mask, target=-1)
    with pytest.raises(ValueError, match="expected a mask"):
        FeatureTrigger(trigger.generator, trigger.mask + 1, target=0)


@pytest.mark.integration
def test_unlearning_closes_the_gate_and_keeps_the_digits(model, data):
    images, labels = data
    state = copy.deepcopy(model.state_dict())
    rule = BtiDbfUnlearning(inversion=BTI, rounds=1, steps=60, lr=2e-2, trigger_share=0.3)
    repaired = rule.repair(model, images, labels, seed=3)
    assert isinstance(repaired, Repaired) and rule.name == "bti-dbf"
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    json.dumps(repaired.log, allow_nan=False)
    assert repaired.log["target"] == TARGET and len(repaired.log["rounds"]) == 1
    shifted = images.clone()
    shifted[:, 2] += 0.15
    shifted[:, 0] -= 0.15
    shifted, others = shifted.clamp(0, 1), labels != TARGET
    reached = [m(shifted[others]).argmax(1) == TARGET for m in (model, repaired.model)]
    assert reached[0].float().mean() > 0.95 and reached[1].float().mean() < 0.3
    right = (repaired.model(images).argmax(1) == labels).float().mean()
    assert not repaired.model.training and right > 0.9


@pytest.mark.integration
def test_rounds_ask_for_the_first_label_and_repeat_for_a_seed(model, data):
    tiny = BtiDbfConfig(width=2, depth=1, steps=2, mask_steps=2)
    state = torch.get_rng_state()
    one, same = (
        BtiDbfUnlearning(inversion=tiny, rounds=3, steps=4).repair(model, *data) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(one.model.parameters(), same.model.parameters(), strict=True)
    assert one.log == same.log and all(torch.equal(a, b) for a, b in pairs)
    wanted = ["features", "label", "prediction", "share"]
    assert [sorted(entry) for entry in one.log["rounds"]] == [wanted] * 3
    assert one.log["target"] == one.log["rounds"][0]["label"]
    with pytest.raises(ValueError, match="at least 2 images"):
        BtiDbfUnlearning(inversion=tiny).repair(model, data[0][:1], data[1][:1])


@pytest.mark.parametrize("detector", DETECTORS)
def test_presets_and_settings(detector):
    assert type(detector).preset() == type(detector)()
    assert type(detector).preset("paper", steps=3, alpha=0.1).settings["steps"] == 3
    assert json.loads(json.dumps(detector.settings)) == detector.settings
    with pytest.raises(ValueError, match="preset"):
        type(detector).preset("slow")
