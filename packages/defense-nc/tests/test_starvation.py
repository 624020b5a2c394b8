"""Searches without gradients are seen, and outputs that only squash or scale hide nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from defense_nc import NCConfig, NeuralCleanse, Verdict, judge, open_scan
from defense_nc.gradients import GradientCount, vanished
from wm_victim.logits import Logits
from wm_victim.toy_backdoors import planted_classifier, planted_images

TARGET = 3
CLASSES = 4
SHORT = NCConfig.preset("fast", steps=6, starts=("random",), batch_size=8, precision="float32")
TINY = NCConfig.preset("fast", steps=2, batches=1, batch_size=8, precision="float32")


class Changed(nn.Module):
    """A classifier with something in front of it and behind it."""

    def __init__(self, model, before=lambda x: x, behind=lambda y: y):
        super().__init__()
        self.model, self.before, self.behind = model, before, behind

    def forward(self, images):
        return self.behind(self.model(self.before(images)))


@pytest.fixture(scope="module")
def data():
    return planted_images(60, num_classes=CLASSES)


def planted(kind="patch"):
    return planted_classifier(kind, num_classes=CLASSES, target=TARGET)


def scanned(model, data, config=SHORT):
    return NeuralCleanse(config).scan(model, data.images, labels=data.labels, progress=False)


def test_a_gradient_has_vanished_where_it_cannot_close_a_tenth_of_the_distance():
    logits = torch.tensor([[5.0, 0], [5, 0], [5, 0], [5, 0], [0, 5]])
    gradients = torch.tensor([0.6, 0.4, 0, float("nan"), 0])[:, None]
    goals = torch.ones(5, dtype=torch.long)
    assert vanished(gradients, logits, goals).tolist() == [False, True, True, True, False]
    # Whatever the scale of the logits is.
    small = vanished(1e-6 * gradients, 1e-6 * logits, goals)
    assert small.tolist() == [False, True, True, True, False]


def test_counts_add_up():
    count = GradientCount()
    assert count.share == 0
    count.add(4, 1)
    count += GradientCount(4, 3)
    assert count.share == 0.5 and GradientCount(*count.state_dict()) == count


def test_a_starved_search_is_not_clean():
    scores, rates = torch.linspace(40, 80, 10), torch.ones(10)
    starved = [0.0] * 9 + [0.9]
    assert judge("test", scores, rates, floor=0.9, starved=[0.5] * 10).verdict is Verdict.CLEAN
    report = judge("test", scores, rates, floor=0.9, starved=starved)
    assert report.verdict is Verdict.NOT_SCANNED and "label 9" in report.reason
    scores[0] = 2
    assert judge("test", scores, rates, floor=0.9, starved=starved).suspected == (0,)


def test_where_most_searches_are_starved_no_score_counts():
    scores, rates = torch.linspace(40, 80, 10), torch.ones(10)
    scores[0] = 2
    starved = [0.6] * 6 + [0.0] * 4
    report = judge("test", scores, rates, floor=0.9, starved=starved)
    assert report.verdict is Verdict.NOT_SCANNED and report.suspected == ()
    assert json.loads(json.dumps(report.to_dict()))["starved"] == pytest.approx(starved)


MASKED = {
    "rounded outputs": {"behind": lambda y: (10 * y).round() / 10},
    "rounded images": {"before": lambda x: (4 * x).round() / 4},
    "thresholds": {"before": lambda x: (x > 0.5).float()},
    "no number as gradient": {"before": lambda x: x + 0 * (x - x.detach()).sqrt()},
    "a sigmoid that saturates": {"behind": lambda y: (1000 * y).sigmoid()},
}


@pytest.mark.integration
def test_a_search_without_gradients_is_not_scanned(data, subtests):
    for name, change in MASKED.items():
        with subtests.test(masked=name):
            report = scanned(Changed(planted(), **change), data, SHORT)
            assert report.verdict is Verdict.NOT_SCANNED and report.suspected == ()
            assert max(report.starved) > 0.5
    report = scanned(planted(), data, SHORT)
    assert max(report.starved) < 0.01 and report.notes == ()


def test_one_label_at_a_time_counts_as_well(data):
    one = NCConfig.preset("reference", steps=2, batches=1, starts=("random",))
    assert scanned(Changed(planted(), **MASKED["thresholds"]), data, one).starved == (1,) * CLASSES
    assert max(scanned(planted(), data, one).starved) < 0.01


def test_outputs_are_turned_to_logits_of_a_usual_scale(data, subtests):
    model = planted()
    with open_scan(model, data.images, labels=data.labels) as inputs:
        assert inputs.model is model and inputs.notes == ()
    with torch.no_grad():
        logits = model(data.images)
    ends = {
        "tiny": (lambda y: 1e-3 * y, "multiplied"),
        "huge": (lambda y: 1e3 * y, "multiplied"),
        "sigmoid": (lambda y: (3 * y).sigmoid(), "a range of 0 to 1"),
        "sigmoid, per cent": (lambda y: 100 * (3 * y).sigmoid(), "a range of 0 to 100"),
        "a little beside": (lambda y: (3 * y).sigmoid() + 1e-6 * torch.arange(CLASSES), "0 to 1"),
        "tanh": (lambda y: (3 * y).tanh(), "a range of -1 to 1"),
        "softmax": (lambda y: (3 * y).softmax(1), "probabilities"),
        "softmax, per cent": (lambda y: 100 * (3 * y).softmax(1), "probabilities"),
    }
    for name, (end, note) in ends.items():
        with subtests.test(end=name):
            changed = Changed(model, behind=end)
            with open_scan(changed, data.images, labels=data.labels) as inputs:
                assert isinstance(inputs.model, Logits) and note in inputs.notes[0]
                outputs = inputs.model(data.images)
            assert torch.equal(outputs.argsort(1), logits.argsort(1))
            high = outputs.topk(2).values
            assert 1 <= float((high[:, 0] - high[:, 1]).median()) <= 200


# --- models as people have them -------------------------------------------------------------------


class InPlace(nn.Module):
    """Normalises its images where they are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.sub_(0.1).mul_(2).div_(2).add_(0.1))


def test_a_model_that_changes_its_images_leaves_those_of_the_caller(data):
    images = data.images.clone()
    report = NeuralCleanse(TINY).scan(InPlace(planted()), images, progress=False)
    assert torch.equal(images, data.images)
    plain = NeuralCleanse(TINY).scan(planted(), images, progress=False)
    scores = [[label.score for label in each.labels] for each in (report, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)


def test_outputs_that_are_no_tensor_are_named(data):
    for wrong, kind in ((lambda y: (y, y), "tuple"), (lambda y: {"logits": y}, "dict")):
        with pytest.raises(ValueError, match=f"one tensor .* got {kind}"):
            NeuralCleanse(TINY).scan(Changed(planted(), behind=wrong), data.images, progress=False)


@pytest.mark.integration
def test_a_scan_works_in_inference_mode(data):
    plain = NeuralCleanse(TINY).scan(planted(), data.images, labels=data.labels, progress=False)
    with torch.inference_mode():
        images, labels, model = data.images.clone(), data.labels.clone(), planted()
        # All of these are tensors that no gradient can pass.
        model.load_state_dict(
            {name: value.clone() for name, value in model.state_dict().items()}, assign=True
        )
        inside = NeuralCleanse(TINY).scan(model, images, labels=labels, progress=False)
        assert torch.is_inference_mode_enabled()
    assert inside == plain
