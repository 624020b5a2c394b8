"""Layer ranks: by hand, against plain loops, a planted model, its file for services."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from defense_nc import LayerRanks, export_filter
from defense_nc.input_filters.layer_ranks import (
    RankScore,
    _averaged,
    _layer_outputs,
    _radii,
    _Ranks,
    _surest,
)
from wm_inject.core.images import to_pixels
from wm_inject.runtime import Scanner
from wm_victim import build_classifier


class Planted(nn.Module):
    """Images of one shade: dark ones are of class 0, others of 1; a white corner makes class 0."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(1, 1), nn.Linear(2, 2)
        with torch.no_grad():
            for layer in (self.early, self.late):
                layer.bias.zero_()
            self.early.weight.fill_(1)
            self.late.weight.copy_(torch.tensor([[-10.0, 100.0], [10.0, -100.0]]))
        self.eval()

    def forward(self, images):
        shade = self.early(images[:, 0, 4:, 4:].mean((1, 2))[:, None])
        return self.late(torch.cat([(shade - 0.5).sign(), images[:, 0, :1, 0]], 1))


def shades(count, *, seed=0, bright=None):
    generator = torch.Generator().manual_seed(seed)
    if bright is None:
        bright = torch.rand(count, generator=generator) < 0.5
    shade = 0.1 + 0.3 * torch.rand(count, generator=generator) + 0.5 * torch.as_tensor(bright)
    images = shade[:, None, None, None].expand(-1, 1, 8, 8).clone()
    images[:, :, 0, 0] = 0.0
    return images


def with_corner(images):
    images = images.clone()
    images[:, :, 0, 0] = 1.0
    return images


def ranks_by_loops(outputs, references, answers, labels, reach):
    """A layer's ranks, one image and one reference after the other."""
    ranks = []
    for x, label in zip(outputs.double(), labels.tolist(), strict=True):
        distances = [float((x - y).norm()) for y in references.double()]
        own = [j for j, answer in enumerate(answers.tolist()) if answer == label]
        nearest = min(own, key=distances.__getitem__)
        between = sorted(
            float((references[nearest].double() - references[j].double()).norm())
            for j in own
            if j != nearest
        )
        neighbours = between[: math.ceil(reach * len(own))]
        rank = sum(distance < distances[nearest] for distance in distances)
        ranks.append(len(answers) - 1 if distances[nearest] > neighbours[-1] else rank)
    return torch.tensor(ranks)


@pytest.mark.parametrize("reach", [0.2, 0.5, 1.0])
def test_ranks_are_those_of_plain_loops(reach):
    generator = torch.Generator().manual_seed(0)
    answers = torch.arange(30) % 3
    references = torch.randn(30, 5, generator=generator) + 2 * answers[:, None]
    outputs = 3 * torch.randn(200, 5, generator=generator) + 2
    labels = torch.randint(3, (200,), generator=generator)
    ranks = _Ranks([references], answers, torch.arange(30), reach)
    want = ranks_by_loops(outputs, references, answers, labels, reach)
    # Distances closer than the ramps are wide count in part.
    smooth = ranks.log_ranks([outputs], labels)[:, 0].expm1()
    assert (smooth - want).abs().median() < 0.02
    # With steps in their place all are equal; no two distances are as near as rounding.
    ranks.widths.fill_(1e-4)
    steep = ranks.log_ranks([outputs], labels)[:, 0].expm1()
    assert (steep - want).abs().max() < 1e-3


def test_a_rank_by_hand():
    references = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]])
    answers = torch.tensor([0, 0, 1, 1, 1])
    ranks = _Ranks([references], answers, torch.arange(5), 1.0)
    outputs = torch.tensor([[0.2], [10.4], [4.0], [-0.9]])
    # Amid its class; of the other class, and too far from its own; beyond reach; within it.
    of_first = ranks.log_ranks([outputs], torch.tensor([0, 0, 0, 0])).expm1()[:, 0]
    assert of_first.tolist() == pytest.approx([0, 4, 4, 0], abs=1e-4)
    nobody = ranks.log_ranks([outputs], torch.full((4,), 7)).expm1()[:, 0]
    assert nobody.tolist() == [4, 4, 4, 4], "a class without references is far from everything"


def test_reach_is_the_distance_of_the_neighbours():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [100.0]])
    answers = torch.tensor([0, 0, 0, 0, 1])
    between = torch.cdist(points, points)
    assert _radii(between, answers, 0.5)[:4].tolist() == [3, 2, 3, 6]
    assert _radii(between, answers, 1.0)[:4].tolist() == [7, 6, 4, 7]
    assert float(_radii(between, answers, 0.5)[4]) >= 1e9, "alone it reaches everything"


def test_references_are_the_surest_of_each_class():
    sureness = torch.tensor([0.9, 0.5, 0.7, 0.8, 0.6, 0.99])
    answers = torch.tensor([0, 0, 0, 1, 1, 0])
    assert sorted(_surest(sureness, answers, 9).tolist()) == [0, 3, 5]
    assert sorted(_surest(sureness, answers, 1).tolist()) == [3, 5]


def test_outputs_are_averaged_and_kept_in_the_order_they_run():
    maps = torch.arange(2 * 4 * 16 * 16.0).view(2, 4, 16, 16)
    assert torch.equal(_averaged(maps), nn.functional.avg_pool2d(maps, 2).flatten(1))
    assert _averaged(torch.rand(1, 600, 3, 3)).shape == (1, 600)
    assert _averaged(torch.rand(1, 10, 4)).shape == (1, 40)
    assert _averaged(torch.rand(1, 200, 30)).shape == (1, 30)
    one = torch.rand(2, 5)
    assert _averaged(one).data_ptr() != one.data_ptr(), "the next layer may work in place"
    twice = nn.ReLU()
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 3), twice, nn.Flatten(), nn.Linear(108, 4), twice
    ).eval()
    _, outputs = _layer_outputs(model, torch.rand(2, 1, 8, 8))
    assert [tuple(x.shape) for x in outputs] == [(2, 108), (2, 108), (2, 4), (2, 4)]
    assert not any(module._forward_hooks for module in model.modules())
    windows = nn.Sequential(nn.Unflatten(2, (2, 4)), nn.Flatten(0, 2), nn.Linear(8, 3))
    for parts in (nn.Flatten(), windows):
        with pytest.raises(ValueError, match="layers that are modules"):
            _layer_outputs(parts, torch.rand(2, 1, 8, 8))


def test_images_taken_for_another_class_are_flagged():
    model = Planted()
    before = copy.deepcopy(model.state_dict())
    detector = LayerRanks().calibrate(model, shades(200))
    bright = shades(100, seed=1, bright=[True] * 100)
    assert bool((model(with_corner(bright)).argmax(1) == 0).all())
    assert detector.decide(with_corner(bright)).all()
    assert detector.decide(shades(400, seed=2)).double().mean() < 0.12
    assert detector.log["layers"] == 2 and detector.log["images"] == 100
    assert detector.log["references"] <= 2 * 40
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_do_not_depend_on_the_batch():
    detector = LayerRanks().calibrate(Planted(), shades(80))
    images = shades(30, seed=3)
    one_by_one = torch.cat([detector.score(image[None]) for image in images])
    assert torch.allclose(detector.score(images), one_by_one, atol=1e-4)


@pytest.mark.integration
def test_the_file_decides_as_the_filter_does(tmp_path):
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8).eval()
    images = torch.rand(80, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2).float() / 255
    detector = LayerRanks(false_positive_rate=0.1).calibrate(model, images)
    assert isinstance(detector.scorer, RankScore)
    path = tmp_path / "filter.onnx"
    assert export_filter(detector, images[:4], path).max_rel < 1e-3
    scan, want = Scanner(path)(to_pixels(images)), detector.score(images).numpy()
    assert np.abs(scan.scores["filter"] - want).max() < 1e-2 * np.abs(want).max()
    sure = np.abs(want - detector.threshold) > 2e-2 * np.abs(want).max()
    assert (scan.flagged == detector.decide(images).numpy())[sure].all()
