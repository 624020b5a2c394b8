"""Head weights: layers of many forms are found by what they do, and their rows are summed up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_reverse.detectors import HeadWeights
from defense_reverse.detectors.head_weights import head_of, positive_sums
from wm_victim import build_classifier

CLASSES, WIDTH = 6, 9
IMAGES = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % CLASSES
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


@pytest.mark.parametrize("form", ["linear", "transposed", "buffer", "convolution", "log-softmax"])
def test_the_layer_is_found_whatever_its_form(form: str) -> None:
    model = Net(form).eval()
    model.rows.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    head = head_of(model, IMAGES)
    assert head is not None and torch.equal(head, ROWS.double())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_square_layers_and_scripted_modules_are_read_too() -> None:
    square = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    for form in ("linear", "transposed"):
        head = head_of(Net(form, square).eval(), IMAGES)
        assert head is not None and torch.equal(head, square.double())
    scripted = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval(), IMAGES[:2])
    head = head_of(scripted, IMAGES)
    assert head is not None and head.shape == (4, 432)


def test_layers_whose_logits_are_added_up_stand_side_by_side() -> None:
    head = head_of(Net("two").eval(), IMAGES)
    assert head is not None and torch.equal(head, torch.cat([ROWS, ROWS], 1).double())


def test_the_networks_of_this_project_have_one() -> None:
    for name in ("resnet10", "vgg16", "mobilenetv2", "wanet-mnist", "airbench"):
        channels, side = (1, 28) if name == "wanet-mnist" else (3, 32)
        model = build_classifier(name, num_classes=7, channels=channels, image_size=side, width=8)
        images = torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(0))
        head = head_of(model.eval(), images)
        assert head is not None and len(head) == 7


def test_a_model_without_such_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="linear layer"):
        HeadWeights().scan(Net("constant"), IMAGES, labels=LABELS)
    with pytest.raises(ValueError, match="rows that differ"):
        HeadWeights().scan(Net(rows=torch.ones(CLASSES, WIDTH)), IMAGES, labels=LABELS)


def test_sums_are_those_of_numpy_and_what_all_rows_share_says_nothing() -> None:
    rows = ROWS.double().numpy()
    centred = rows - rows.mean(0)
    sums = positive_sums(ROWS.double())
    np.testing.assert_allclose(sums, np.where(centred > 0, centred, 0).sum(1), rtol=1e-12)
    shared = ROWS.double() + torch.linspace(-3, 3, WIDTH).double()
    np.testing.assert_allclose(positive_sums(shared), sums, rtol=1e-9)


def test_the_label_with_much_positive_weight_is_named() -> None:
    rows = ROWS.clone()
    rows[4] = 9 * rows[4].abs()
    report = HeadWeights().scan(Net(rows=rows), IMAGES, labels=LABELS)
    assert report.suspected == (4,) and report.p_value < 0.01
    sums = positive_sums(rows.double())
    wanted = float(sums.quantile(0.5) / sums[4])
    assert report.labels[4].score == pytest.approx(wanted) and wanted < 0.3
    # Scores are ratios within a model: neither its scale nor its images matter.
    again = HeadWeights().scan(Net(rows=7 * rows), IMAGES[:20], labels=LABELS[:20])
    assert [x.score for x in again.labels] == pytest.approx([x.score for x in report.labels])
    json.dumps(report.to_dict(), allow_nan=False)


def test_settings() -> None:
    assert HeadWeights.preset() == HeadWeights() == HeadWeights.preset("paper")
    assert HeadWeights().settings == {"probes": 32}
    with pytest.raises(ValueError, match="probes"):
        HeadWeights(probes=0)
