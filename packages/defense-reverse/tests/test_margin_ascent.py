"""Maximum margins: known margins and p-values, a label with a direction of its own, starvation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from defense_nc import Verdict
from defense_reverse.detectors import MarginAscent
from defense_reverse.detectors.margin_ascent import gamma_p_value, margin

CLASSES = 8
IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % CLASSES


def linear(gain: float = 1.0) -> nn.Sequential:
    """Each label reads one pixel of its own; label 2 so many times as strongly."""
    layer = nn.Linear(16, CLASSES)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(20 * torch.eye(CLASSES, 16))
        layer.weight *= torch.linspace(0.9, 1.1, CLASSES)[:, None]
        layer.weight[2] *= gain
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_a_margin_is_over_the_highest_of_the_others() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, 0.0, 1.0]])
    assert margin(logits, 1).tolist() == [1.5, -3.0]
    assert margin(logits, 0).tolist() == [-3.0, 2.0]


def test_the_ascent_reaches_the_largest_margin_of_a_linear_classifier() -> None:
    """At its own pixel 1 and all others 0, a label has its weight as the margin."""
    model = linear()
    report = MarginAscent(starts=4, steps=400).scan(model, IMAGES, labels=LABELS, progress=False)
    weights = model[1].weight.diagonal().tolist()  # type: ignore[union-attr,operator]
    assert report.log["raw"]["margins"] == pytest.approx(weights, rel=1e-5)
    assert report.verdict is Verdict.CLEAN and report.detector == "mm-bd"
    assert json.loads(json.dumps(report.to_dict()))["config"]["raw"] == report.log["raw"]


@pytest.mark.parametrize("changes", [{}, {"start": "noise"}, {"ascent": "gradient", "lr": 0.1}])
def test_a_label_whose_margin_goes_far_is_named(changes: dict[str, object]) -> None:
    detector = MarginAscent(starts=4, steps=40, **changes)  # type: ignore[arg-type]
    reports = [
        detector.scan(linear(6.0), IMAGES, labels=LABELS, progress=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    for report in reports:
        assert report.verdict is Verdict.BACKDOORED and report.suspected == (2,)
        assert report.log["raw"]["gamma_p"] < 1e-3
    assert reports[0].labels == reports[1].labels


def test_images_start_from_other_classes_and_stay_as_they_are() -> None:
    before = IMAGES.clone()
    scanned = MarginAscent(starts=100, steps=1, lr=1e-6).scan(
        linear(), IMAGES, labels=LABELS, progress=False
    )
    assert torch.equal(IMAGES, before)
    with torch.no_grad():
        logits = linear()(IMAGES)
    for label, value in enumerate(scanned.log["raw"]["margins"]):
        assert value == pytest.approx(float(margin(logits, label)[label != LABELS].max()), abs=1e-4)


def test_a_model_of_thresholds_is_not_scanned() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            bright = (images.flatten(1)[:, :CLASSES] > 0.5).float()
            return 10 * bright * self.weight + torch.arange(CLASSES)

    report = MarginAscent(steps=3).scan(Steps(), IMAGES, labels=LABELS, progress=False)
    assert report.verdict is Verdict.NOT_SCANNED


def test_the_papers_p_value_is_that_of_a_gamma_distribution() -> None:
    rest = np.array([4.0, 5.0, 5.5, 6.0, 7.0])
    shape, _, scale = stats.gamma.fit(rest, floc=0)
    expected = 1 - stats.gamma.cdf(8.0, shape, scale=scale) ** 6
    values = torch.tensor([4.0, 8.0, 5.0, 7.0, 5.5, 6.0])
    assert gamma_p_value(values) == pytest.approx(expected, rel=1e-6)
    assert gamma_p_value(torch.tensor([4.0, 80.0, 5.0, 7.0, 5.5, 6.0])) < 1e-9
    assert gamma_p_value(torch.tensor([-1.0, -2.0, 3.0, -4.0, 5.0])) == 1.0


def test_settings() -> None:
    paper = MarginAscent.preset("paper")
    assert (paper.start, paper.ascent, paper.steps, paper.starts) == ("noise", "gradient", 300, 30)
    assert MarginAscent.preset() == MarginAscent()
    for wrong in ({"starts": 0}, {"steps": 0}, {"lr": 0.0}, {"start": "?"}, {"ascent": "?"}):
        with pytest.raises(ValueError, match="expected"):
            MarginAscent(**wrong)  # type: ignore[arg-type]
