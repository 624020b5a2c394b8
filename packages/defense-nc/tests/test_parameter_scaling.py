"""Parameter scaling: which layers, the score by hand, a planted model, its file for services."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from defense_nc import ParameterScaling, export_filter
from defense_nc.input_filters.parameter_scaling import _normalisations
from wm_inject.core.images import to_pixels
from wm_inject.runtime import Scanner
from wm_victim import build_classifier


class Planted(nn.Module):
    """Dark images are of class 0, bright ones of 1; a white corner pixel makes any of class 0.

    Twice normalised brightness beyond what images have is of class 2, which scaling leads to.
    """

    def __init__(self):
        super().__init__()
        # Registered in another order than they run in.
        self.second = nn.BatchNorm2d(1, eps=0)
        self.first = nn.BatchNorm2d(1, eps=0)
        nn.init.ones_(self.first.bias)
        self.eval()

    def forward(self, images):
        inside = self.second(self.first(images[:, :, 1:, 1:].mean((2, 3), keepdim=True)))
        level = inside.flatten()
        corner = 1000.0 * (images[:, 0, 0, 0] > 0.9)
        return torch.stack([corner, 20 * (level - 1.5), 100 * (level - 1.8)], dim=1)


def pictures(count, *, seed=0, corner=False):
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator).expand(-1, 1, 8, 8)
    images = images.clone()
    images[:, :, 0, 0] = float(corner)
    return images


def test_layers_are_taken_in_the_order_they_run_in():
    assert _normalisations(Planted(), pictures(1)) == ["first", "second"]
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten())
    with pytest.raises(ValueError, match="batch normalisation that has weights"):
        _normalisations(plain, pictures(1))


def test_triggered_images_keep_their_label_and_clean_ones_do_not():
    model = Planted()
    before = copy.deepcopy(model.state_dict())
    detector = ParameterScaling().calibrate(model, pictures(100))
    assert detector.log["layers"] == [2, 1, 2], "the last layer suffices, and one more is there"
    assert detector.decide(pictures(50, seed=1, corner=True)).all()
    assert detector.decide(pictures(400, seed=2)).double().mean() < 0.15
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_score_is_that_of_the_mean_share_of_the_own_label():
    model, images = Planted(), pictures(40)
    detector = ParameterScaling(scale=1.2, changed=0.01, copies=2).calibrate(model, images)
    level = images[:, 0, 1:, 1:].mean((1, 2)).double()
    own = model(images).argmax(1)
    shares = []
    # One layer's weight and bias is 1.2 and 0 in place of 1 and 0; then the other's, 1.2 and 1.2.
    for scaled in (1.2 * (level + 1), 1.2 * (1.2 * level + 1.2)):
        logits = torch.stack([0 * scaled, 20 * (scaled - 1.5), 100 * (scaled - 1.8)], dim=1)
        shares.append(logits.softmax(1).gather(1, own[:, None])[:, 0])
    assert detector.log["layers"] == [2, 1, 2]
    want = 1 - torch.stack(shares).mean(0)
    assert torch.allclose((-detector.score(images)).exp(), want, atol=1e-3)
    certain = -detector.score(pictures(4, corner=True))
    assert (certain < -60).all(), "no other label has a share that a probability could show"


def test_where_no_scaling_changes_answers_all_layers_are_scaled():
    detector = ParameterScaling(scale=1.0001).calibrate(Planted(), pictures(60))
    assert detector.log["layers"] == [2, 2]


@pytest.mark.integration
def test_the_file_decides_as_the_filter_does(tmp_path):
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2).float() / 255
    detector = ParameterScaling(false_positive_rate=0.1).calibrate(model, images)
    path = tmp_path / "filter.onnx"
    assert export_filter(detector, images[:4], path).max_rel < 1e-4
    scan, want = Scanner(path)(to_pixels(images)), detector.score(images).numpy()
    assert np.abs(scan.scores["filter"] - want).max() < 1e-4 * np.abs(want).max()
    sure = np.abs(want - detector.threshold) > 1e-3 * np.abs(want).max()
    assert (scan.flagged == detector.decide(images).numpy())[sure].all()
