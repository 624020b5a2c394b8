"""Head weights: layers of many forms are found by what they do; planted rows are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.scan_inputs import open_scan
from defense_reverse.detectors import HeadWeights
from defense_reverse.detectors.head_weights import refusal, unexplained
from defense_reverse.linear_head import find_head
from wm_victim import build_classifier

CLASSES, WIDTH = 6, 9
IMAGES = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Nine maps, and a last layer that is given its form by a name."""

    def __init__(self, form: str = "linear", rows: Tensor = ROWS) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.maps = nn.Conv2d(3, WIDTH, 3)
            # As many rows as there are classes, and yet no head.
            self.first = nn.Conv2d(3, CLASSES, 1)
        self.form = form
        self.rows = nn.Parameter(rows.clone())
        self.columns = nn.Parameter(rows.T.clone())
        self.stored: Tensor
        self.register_buffer("stored", rows.clone())
        self.conv = nn.Conv2d(len(rows.T), len(rows), 1)
        self.conv.weight.data = rows[:, :, None, None].clone()
        self.constant = rows.tolist()

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits, or to the logarithms of probabilities."""
        maps = self.maps(images + self.first(images).mean()).relu()
        read = maps.mean((2, 3))
        if self.form == "transposed":
            return read @ self.columns
        if self.form == "buffer":
            return F.linear(read, self.stored)
        if self.form == "convolution":
            return self.conv(maps).mean((2, 3))
        if self.form == "log-softmax":
            return F.linear(read, self.rows).log_softmax(1)
        if self.form == "two":
            return F.linear(read, self.rows) + read.square() @ self.columns
        if self.form == "constant":
            return F.linear(read, torch.tensor(self.constant))
        return 5 * F.linear(read, self.rows)


def rows_of(model: nn.Module, images: Tensor = IMAGES) -> Tensor | None:
    parts = find_head(model, images)
    return torch.cat([part.rows for part in parts], dim=1) if parts else None


@pytest.mark.parametrize("form", ["linear", "transposed", "buffer", "convolution", "log-softmax"])
def test_the_layer_is_found_whatever_its_form(form: str) -> None:
    model = Net(form).eval()
    model.rows.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rows = rows_of(model)
    assert rows is not None and torch.equal(rows, ROWS.double())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_square_layers_and_scripted_modules_are_read_too() -> None:
    square = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    for form in ("linear", "transposed"):
        rows = rows_of(Net(form, square).eval())
        assert rows is not None and torch.equal(rows, square.double())
    scripted = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval(), IMAGES[:2])
    rows = rows_of(scripted)
    assert rows is not None and rows.shape == (4, 432)


def test_layers_whose_logits_are_added_up_stand_side_by_side() -> None:
    rows = rows_of(Net("two").eval())
    assert rows is not None and torch.equal(rows, torch.cat([ROWS, ROWS], 1).double())


@pytest.mark.parametrize("name", ["resnet10", "vgg16", "mobilenetv2", "wanet-mnist", "airbench"])
def test_the_networks_of_this_project_have_one(name: str) -> None:
    channels, side = (1, 28) if name == "wanet-mnist" else (3, 32)
    model = build_classifier(name, num_classes=7, channels=channels, image_size=side, width=8)
    images = torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(0))
    rows = rows_of(model.eval(), images)
    assert rows is not None and len(rows) == 7


def test_a_model_without_such_a_layer_is_refused() -> None:
    assert refusal(Net().eval(), IMAGES) is None and refusal(Net("constant").eval(), IMAGES)
    with pytest.raises(ValueError, match="linear layer"):
        HeadWeights().scan(Net("constant"), IMAGES, labels=torch.arange(40) % CLASSES)


def test_what_is_not_explained_against_numpy() -> None:
    random = np.random.default_rng(0)
    rows, means = random.normal(size=(CLASSES, WIDTH)), random.normal(size=(CLASSES, WIDTH))
    own, apart = rows - rows.mean(0), means - means.mean(0)
    wanted = [
        own[k][own[k] > 0].sum() * (1 - np.corrcoef(own[k], apart[k])[0, 1]) for k in range(CLASSES)
    ]
    found = unexplained(torch.from_numpy(rows), torch.from_numpy(means))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    # What all rows share says nothing, and rows that point to their own images are explained.
    shared = torch.from_numpy(rows + random.normal(size=WIDTH))
    torch.testing.assert_close(unexplained(shared, torch.from_numpy(means)), found)
    assert float(unexplained(torch.from_numpy(3 * means), torch.from_numpy(means)).max()) < 1e-9


class Bars(nn.Module):
    """Label k lights up feature k; the rows point there, one of them to other features as well."""

    def __init__(self, target: int | None = None, *, heavier: int | None = None) -> None:
        super().__init__()
        noise = torch.randn(CLASSES, 2 * CLASSES, generator=torch.Generator().manual_seed(4))
        rows = torch.cat([torch.eye(CLASSES), torch.zeros(CLASSES, CLASSES)], 1) + noise / 20
        if target is not None:
            rows[target, CLASSES:] += 1.0
        if heavier is not None:
            rows[heavier] *= 2
        self.head = nn.Linear(2 * CLASSES, CLASSES, bias=False)
        self.head.weight.data = rows
        self.reads = 0

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits."""
        self.reads += len(images)
        features = 20 * images.mean((1, 2))[:, : 2 * CLASSES]
        logits: Tensor = self.head(features)
        return logits


BARS = torch.rand(60, 3, 2 * CLASSES, 2 * CLASSES, generator=torch.Generator().manual_seed(5)) / 9
BARS[torch.arange(60), :, :, torch.arange(60) % CLASSES] += 0.5


def test_the_label_whose_images_do_not_explain_its_weights_is_named() -> None:
    report = HeadWeights().scan(Bars(target=4), BARS)
    assert report.suspected == (4,) and report.p_value < 0.01 and report.labels[4].score < 0.3
    assert [label.success_rate for label in report.labels] == [1.0] * CLASSES
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_heavier_row_that_its_images_explain_is_not() -> None:
    for model in (Bars(), Bars(heavier=4)):
        assert HeadWeights().scan(model, BARS).suspected == ()


def test_labels_without_images_are_not_compared() -> None:
    few = BARS[torch.arange(60) % CLASSES != 4]
    report = HeadWeights().scan(Bars(target=4), few)
    assert [label.converged for label in report.labels] == [True] * 4 + [False, True]
    assert report.suspected == ()


def test_too_few_labels_with_images_are_refused() -> None:
    labels = torch.arange(60) % CLASSES
    few = labels < 3
    with pytest.raises(ValueError, match="at least 4 of its 6 labels"):
        HeadWeights().scan(Bars(), BARS[few])
    assert refusal(Bars(), BARS, labels) is None and refusal(Bars(), BARS[few], labels[few])


def test_what_is_read_is_the_mean_of_the_labels_own_images() -> None:
    model = Bars().eval()
    with open_scan(model, BARS) as inputs:
        means, known = HeadWeights()._means(inputs, find_head(model, BARS), seed=0)
    features = 20 * BARS.mean((1, 2)).double()
    labels = torch.arange(60) % CLASSES
    wanted = torch.stack([features[labels == k].mean(0) for k in range(CLASSES)])
    torch.testing.assert_close(means, wanted, rtol=1e-4, atol=1e-4)
    assert bool(known.all())


def test_settings() -> None:
    assert HeadWeights.preset() == HeadWeights() and HeadWeights.preset("paper").most == 500
    assert HeadWeights().settings == {"most": 50, "least": 5}
    for wrong in ({"most": 0}, {"most": 4}):
        with pytest.raises(ValueError, match="most"):
            HeadWeights(**wrong)
