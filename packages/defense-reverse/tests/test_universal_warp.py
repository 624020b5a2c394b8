"""Universal warps: known shifts, the gradient of a field, a planted trigger, refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defense_nc import Verdict
from defense_nc.scan_inputs import ScanInputs
from defense_reverse.detectors import UniversalWarp, WarpField
from defense_reverse.detectors.universal_warp import field_gradient, warp
from wm_inject.attacks.wanet import WaNetTrigger

CLASSES, SIDE = 8, 16
LABELS = torch.arange(80) % CLASSES
# Two rows a class brighter, and the left half of all rows: nothing that a small shift would change.
IMAGES = torch.full((80, 1, SIDE, SIDE), 0.3)
IMAGES[..., : SIDE // 2] += 0.2
for _row in (2 * LABELS, 2 * LABELS + 1):
    IMAGES[torch.arange(80), 0, _row] += 0.2
IMAGES += 0.01 * torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(0))


def rows(gain: float = 0.0) -> nn.Sequential:
    """The brightest rows are the label; label 2 also reads where the left half ends."""
    layer = nn.Linear(SIDE * SIDE, CLASSES)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(torch.eye(CLASSES).repeat_interleave(2 * SIDE, 1))
        column = torch.zeros(SIDE, SIDE)
        column[:, SIDE // 2] = gain
        layer.weight[2] += column.flatten()
        layer.bias[2] -= gain * SIDE * 0.33
    return nn.Sequential(nn.Flatten(), layer).eval()


def test_a_field_of_equal_shifts_moves_the_image() -> None:
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    field = torch.zeros(2, 4, 4)
    field[0] = 2 / (SIDE - 1)  # two pixels are read from the right
    field[1] = -1 / (SIDE - 1)
    moved = warp(images, field)
    torch.testing.assert_close(moved[..., 1:, :-2], images[..., :-1, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[..., 1:, -1], images[..., :-1, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(images, 0 * field), images, atol=1e-5, rtol=0)


def test_a_field_warps_as_wanet_does() -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    wanet = WaNetTrigger(image_size=SIDE, grid=4, strength=1.0, seed=3)
    control = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    field = control[0] / control.abs().mean() / SIDE / 2
    torch.testing.assert_close(WarpField(field)(images), wanet(images), atol=1e-5, rtol=0)


def test_the_gradient_of_a_field_is_that_of_the_whole_way() -> None:
    random = torch.Generator().manual_seed(4)
    images = torch.rand(5, 1, SIDE, SIDE, generator=random)
    field = (0.02 * torch.randn(2, 8, 8, generator=random)).requires_grad_()
    model, goals = rows(8.0), torch.arange(5)
    moved = warp(images, field)
    loss = F.cross_entropy(model(moved), goals, reduction="sum")
    (expected,) = torch.autograd.grad(loss, field, retain_graph=True)
    (of_images,) = torch.autograd.grad(loss, moved)
    with torch.no_grad():
        own = field_gradient(images, field, of_images)
    torch.testing.assert_close(own, expected)


def test_a_label_that_a_small_shift_leads_to_is_named() -> None:
    detector = UniversalWarp(batch_size=8, size=0.02)
    report = detector.scan(rows(8.0), IMAGES, labels=LABELS, progress=False)
    assert report.suspected == (2,) and report.labels[2].success_rate == 1
    assert list(report.triggers) == [2]
    trigger, others = report.triggers[2], IMAGES[LABELS != 2]
    assert isinstance(trigger, WarpField)
    assert float(trigger.field.square().mean().sqrt()) == pytest.approx(0.02)
    assert float((rows(8.0)(trigger(others)).argmax(1) == 2).float().mean()) > 0.75
    clean = detector.scan(rows(), IMAGES, labels=LABELS, progress=False)
    # No verdict is calibrated for so few pixels.
    assert clean.suspected == () and clean.verdict is not Verdict.BACKDOORED
    assert all(1 < label.score < 2.1 for label in clean.labels) and not clean.triggers
    json.dumps(clean.to_dict(), allow_nan=False)


def test_a_scan_that_is_done_costs_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, file = UniversalWarp(steps=2), tmp_path / "state.safetensors"
    scan = partial(detector.scan, rows(8.0), IMAGES, labels=LABELS, progress=False)
    whole = scan(checkpoint=file).to_dict()
    monkeypatch.setattr(UniversalWarp, "_field", None)
    assert scan(checkpoint=file).to_dict() == whole
    with pytest.raises(ValueError, match="another run"):
        scan(checkpoint=file, seed=1)


def test_few_images_and_a_label_that_all_of_them_have() -> None:
    inputs = ScanInputs(rows(), IMAGES[:16:8], LABELS[:16:8], CLASSES)
    found = UniversalWarp(steps=2).search(inputs, seed=0)
    assert found.fields.shape == (CLASSES, 2, 8, 8)
    assert float(found.gaps[0]) == 1 and float(found.rates[0]) == 0  # nothing is known of it


def test_settings() -> None:
    assert UniversalWarp.preset() == UniversalWarp()
    assert UniversalWarp.preset("paper").steps > UniversalWarp().steps
    assert json.loads(json.dumps(dict(UniversalWarp().settings))) == UniversalWarp().settings
    for wrong in ({"steps": 0}, {"grid": 1}, {"size": 0.0}, {"works": 0.0}, {"alpha": 2.0}):
        with pytest.raises(ValueError, match="expected"):
            UniversalWarp(**wrong)  # type: ignore[arg-type]
    for field in (torch.zeros(2, 4, 5), torch.zeros(3, 4, 4), torch.full((2, 4, 4), torch.nan)):
        with pytest.raises(ValueError, match="finite field"):
            WarpField(field)
