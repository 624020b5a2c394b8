"""Searches without gradients are seen, and outputs that only squash or scale hide nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defense_nc import NCConfig, NeuralCleanse, Verdict, judge
from defense_nc.gradients import GradientCount, vanished
from wm_victim.toy_backdoors import planted_classifier, planted_images

TARGET = 3
CLASSES = 6
QUICK = NCConfig.preset("fast", steps=24, starts=("random",), precision="float32")


class Changed(nn.Module):
    """A classifier with something in front of it and behind it."""

    def __init__(self, model, before=lambda x: x, behind=lambda y: y):
        super().__init__()
        self.model, self.before, self.behind = model, before, behind

    def forward(self, images):
        return self.behind(self.model(self.before(images)))


@pytest.fixture(scope="module")
def data():
    return planted_images(100, num_classes=CLASSES)


def planted(kind="patch"):
    return planted_classifier(kind, num_classes=CLASSES, target=TARGET)


def scanned(model, data, config=QUICK):
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
    clean = judge("test", scores, rates, floor=0.9, starved=starved)
    assert clean.verdict is Verdict.CLEAN and clean.starved == tuple(starved)
    rates[9] = 0.2
    report = judge("test", scores, rates, floor=0.9, starved=starved)
    assert report.verdict is Verdict.NOT_SCANNED and "label 9" in report.reason
    scores[0] = 2
    assert judge("test", scores, rates, floor=0.9, starved=starved).suspected == (0,)
