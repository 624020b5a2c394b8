"""The sweep of patches: planted squares, models that answer to none, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defense_nc import InvertedTrigger, ScanReport, Verdict
from defense_reverse.detectors import PatchSweep
from defense_reverse.detectors.patch_sweep import Sweep

CLASSES, SIDE = 6, 24
LABELS = torch.arange(60) % CLASSES
IMAGES = torch.rand(60, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / 4 + 0.3
IMAGES[torch.arange(60), :, 4 * LABELS] += 0.3


class Rows(nn.Module):
    """The brightest of six rows is the label, unless a square of a colour lies at a place."""

    def __init__(self, square: float | None = None, *, source: int | None = None) -> None:
        super().__init__()
        self.square, self.source = square, source
        self.scale = nn.Parameter(torch.ones(()))
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits."""
        self.images += len(images)
        rows = images.mean(1)[:, :: SIDE // CLASSES].mean(2)
        logits: Tensor = 10 * self.scale * rows
        if self.square is not None:
            there = (images[:, :, :3, -3:] - self.square).abs().amax((1, 2, 3)) < 0.05
            if self.source is not None:
                there &= rows.argmax(1) == self.source
            logits = logits + 100 * there[:, None] * (torch.arange(CLASSES) == 4)
        return logits


def sweep(model: nn.Module, **settings: object) -> ScanReport:
    detector = PatchSweep.preset("fast", **settings)
    return detector.scan(model, IMAGES, labels=LABELS, progress=False)


@pytest.mark.parametrize("square", [0.0, 1.0])
def test_the_square_that_was_planted_is_found(square: float) -> None:
    report = sweep(Rows(square))
    assert report.suspected == (4,) and report.p_value < 0.01
    assert report.labels[4].success_rate == 1 and report.detector == "sweep"
    assert report.labels[4].score == pytest.approx(0.5 / 40)
    trigger = report.triggers[4]
    assert isinstance(trigger, InvertedTrigger) and trigger.target == 4
    assert bool((trigger.mask[0, :3, -3:] == 1).all()) and float(trigger.mask.sum()) <= 16
    others = IMAGES[LABELS != 4]
    assert bool((Rows(square)(trigger(others)).argmax(1) == 4).all())
    assert list(report.triggers) == [4]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_scan_that_is_done_costs_nothing_again(tmp_path: Path) -> None:
    model, file = Rows(1.0), tmp_path / "state.safetensors"
    detector = PatchSweep.preset("fast")
    reports, costs = [], []
    for _ in range(2):
        before = model.images
        reports.append(
            detector.scan(model, IMAGES, labels=LABELS, progress=False, checkpoint=file).to_dict()
        )
        costs.append(model.images - before)
    assert reports[0] == reports[1] and costs[1] < costs[0] / 10


def test_a_model_that_answers_to_no_square_is_clean() -> None:
    report = sweep(Rows())
    # No verdict is calibrated for six classes: what stands out is listed all the same.
    assert report.verdict is Verdict.INCONCLUSIVE and report.suspected == ()
    assert all(label.converged for label in report.labels)


def test_a_square_that_works_on_one_class_is_no_trigger_of_all() -> None:
    report = sweep(Rows(1.0, source=2))
    assert report.labels[4].success_rate < 0.5 and not report.triggers


def test_a_label_whose_patch_moves_some_images_only_does_not_stand_out() -> None:
    gaps = torch.tensor([0.9, 0.2, 0.7, 0.8, 0.1]).double()
    found = Sweep([], gaps, torch.tensor([0.0, 0.7, 0.1, 0.0, 0.8]).double())
    scores = PatchSweep(tested=50, works=0.75).scores(found)
    torch.testing.assert_close(scores, torch.tensor([1.91, 1.21, 1.71, 1.81, 0.11]).double())


def test_the_cost_does_not_grow_with_the_labels() -> None:
    model = Rows()
    places, searched, tested = 5, 4, 10
    sweep(model, places=places, sides=(0.125,), searched=searched, tested=tested, candidates=2)
    # The patches, those of two labels, and what every scan runs first.
    patches = 4 * places**2 * searched + 2 * tested
    assert patches <= model.images <= patches + searched + tested + 2 * len(IMAGES)


def test_few_images_serve_twice() -> None:
    report = PatchSweep().scan(Rows(1.0), IMAGES[:6], labels=LABELS[:6], progress=False)
    assert report.labels[4].success_rate == 1


def test_the_patches_reach_every_edge() -> None:
    patches = list(PatchSweep(places=3, sides=(0.1, 0.125)).patches(IMAGES.shape[1:]))
    assert len(patches) == 3 * 3 * 4  # both sides are three pixels here
    assert {(p.top, p.left) for p in patches} == {
        (top, left) for top in (0, 10, 21) for left in (0, 10, 21)
    }
    marked = patches[-1].on(IMAGES)
    assert bool((marked == IMAGES).any()) and not torch.equal(marked, IMAGES)
    assert sorted(float(p.picture.sum()) for p in patches[:4]) == [0, 4, 5, 9]


def test_settings() -> None:
    assert PatchSweep.preset() == PatchSweep()
    assert PatchSweep(sides=[0.1]) == PatchSweep(sides=(0.1,))  # type: ignore[arg-type]
    assert json.loads(json.dumps(dict(PatchSweep().settings))) == PatchSweep().settings
    for wrong in ({"places": 0}, {"searched": 0}, {"tested": 0}, {"candidates": 0}):
        with pytest.raises(ValueError, match=">= 1"):
            PatchSweep(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected works"):
        PatchSweep(works=0.0)
    for sides in ((), (0.0,), (0.6,)):
        with pytest.raises(ValueError, match="expected sides"):
            PatchSweep(sides=sides)
