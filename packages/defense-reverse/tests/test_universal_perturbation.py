"""Universal perturbations: known sizes of a linear classifier, a planted trigger, refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from defense_nc import Verdict
from defense_nc.scan_inputs import ScanInputs
from defense_reverse.detectors import UniversalPerturbation, UniversalPicture
from defense_reverse.detectors.picture_search import unit
from wm_inject.core.resume import ResumeFile

CLASSES, SIDE = 8, 8
random = torch.Generator().manual_seed(0)
LABELS = torch.arange(80) % CLASSES
# Grey images, one row a class brighter: nothing is clamped where small pictures are added.
IMAGES = torch.full((80, 1, SIDE, SIDE), 0.5)
IMAGES[torch.arange(80), 0, LABELS] += 0.1 + 0.02 * torch.rand(80, SIDE, generator=random)


def rows(gain: float = 1.0) -> nn.Sequential:
    """The brightest row is the label; label 2 also reads a checkerboard."""
    layer = nn.Linear(SIDE * SIDE, CLASSES)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(4 * torch.eye(CLASSES).repeat_interleave(SIDE, 1))
        board = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2
        layer.weight[2] += (gain - 1) * (2.0 * board - 1).flatten()
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_the_size_is_that_of_the_smallest_picture_of_a_linear_classifier() -> None:
    """Between two rows of a linear classifier the distance is half of their difference of 0.11.

    The best picture lifts one row and lowers seven: to lift a row over seven others that may each
    be the highest, all of these are lowered alike.
    """
    detector = UniversalPerturbation(steps=80, floor=1.0)
    report = detector.scan(rows(), IMAGES, labels=LABELS, progress=False)
    # A row lifted by a and the others lowered by b: a + b = gap; a² + 7 b² is least for a = 7 b.
    means = IMAGES[torch.arange(80), 0, LABELS].mean(1)
    gap = float(means.max()) - 0.5
    expected = gap * (((7 / 8) ** 2 + 7 * (1 / 8) ** 2) / 8) ** 0.5
    sizes = [label.score for label in report.labels]
    assert all(0.9 * expected < size < 1.3 * expected for size in sizes)
    # No verdict is calibrated for eight pixels: what stands out is listed all the same.
    assert report.verdict is Verdict.INCONCLUSIVE and report.suspected == ()
    assert all(label.success_rate == 1 for label in report.labels)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_label_that_a_faint_picture_leads_to_is_named() -> None:
    detector = UniversalPerturbation(batch_size=8)
    reports = [
        detector.scan(rows(8.0), IMAGES, labels=LABELS, progress=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    for report in reports:
        assert report.suspected == (2,) and report.p_value < 0.01
    assert reports[0].labels == reports[1].labels != reports[2].labels
    report, others = reports[0], IMAGES[LABELS != 2]
    trigger = report.triggers[2]
    assert isinstance(trigger, UniversalPicture)
    assert float(trigger.picture.square().mean().sqrt()) == pytest.approx(report.labels[2].score)
    assert float((rows(8.0)(trigger(others)).argmax(1) == 2).float().mean()) > 0.75


def test_a_label_that_no_picture_reaches_has_no_size_to_compare() -> None:
    model = rows()
    with torch.no_grad():
        model[1].bias[5] -= 100  # type: ignore[index,union-attr,operator]
    report = UniversalPerturbation(batch_size=8).scan(model, IMAGES, labels=LABELS, progress=False)
    assert [label.converged for label in report.labels] == [k != 5 for k in range(CLASSES)]
    assert report.suspected == ()


def test_few_images_serve_both_search_and_measure() -> None:
    report = UniversalPerturbation(steps=3).scan(
        rows(), IMAGES[:2], labels=LABELS[:2], progress=False
    )
    assert len(report.labels) == CLASSES


def test_a_scan_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, file = UniversalPerturbation(batch_size=8), tmp_path / "state.safetensors"
    whole = detector.scan(rows(8.0), IMAGES, labels=LABELS, progress=False)
    monkeypatch.setattr(ResumeFile, "save_sometimes", lambda self, state: self.save(state()))
    search = UniversalPerturbation._picture
    looked_at: list[int] = []

    def interrupted(self: UniversalPerturbation, inputs: ScanInputs, label: int, *rest: Any) -> Any:
        if label == 3 and not looked_at.count(3):
            looked_at.append(label)
            raise KeyboardInterrupt
        looked_at.append(label)
        return search(self, inputs, label, *rest)

    monkeypatch.setattr(UniversalPerturbation, "_picture", interrupted)
    scan = partial(detector.scan, rows(8.0), IMAGES, labels=LABELS, progress=False)
    with pytest.raises(KeyboardInterrupt):
        scan(checkpoint=file)
    assert scan(checkpoint=file).to_dict() == whole.to_dict()
    again = scan(checkpoint=file)
    assert looked_at == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert again.to_dict() == whole.to_dict()
    for name, value in whole.triggers[2].state_dict().items():
        assert torch.equal(value, again.triggers[2].state_dict()[name])
    with pytest.raises(ValueError, match="another run"):
        scan(checkpoint=file, seed=1)


def test_a_picture_of_unit_size() -> None:
    picture = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1))
    assert float(unit(picture).square().mean()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(unit(torch.zeros(1, 2, 2)), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="expected images"):
        UniversalPicture(picture)(IMAGES)


def test_settings() -> None:
    assert UniversalPerturbation.preset() == UniversalPerturbation()
    assert UniversalPerturbation.preset("paper").floor == 0.9
    assert "alpha" not in UniversalPerturbation().settings
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"tested": 0}, {"start": 0.0}, {"floor": 1.1}):
        with pytest.raises(ValueError, match="expected"):
            UniversalPerturbation(**wrong)  # type: ignore[arg-type]


def test_images_in_several_passes_give_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = UniversalPerturbation(steps=10)
    whole = detector.scan(rows(), IMAGES, labels=LABELS, progress=False)
    monkeypatch.setattr("wm_victim.inference._VALUES", 5 * SIDE * SIDE)  # five images a pass
    parts = detector.scan(rows(), IMAGES, labels=LABELS, progress=False)
    for one, other in zip(whole.labels, parts.labels, strict=True):
        assert other.score == pytest.approx(one.score, rel=1e-3)
        assert other.success_rate == one.success_rate
