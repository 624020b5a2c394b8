"""Sharpness-aware fine-tuning: the climb has exactly its length, and leaves nothing behind."""

import pytest
import torch
from torch import nn

from defense_reverse.mitigations import FTSAM, FineTuning
from defense_reverse.mitigations.ft_sam import climb, sam_update
from wm_victim.toy_backdoors import planted_images


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.3), nn.Linear(384, 10)),
        )


def length(tensors):
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())


def test_the_climb_is_rho_long(subtests):
    for rho in [0.05, 2.0, 8.0]:
        with subtests.test(rho=rho):
            weights, gradients = draw((4, 3), (7,), seed=0), draw((4, 3), (7,), seed=1)
            plain = climb(weights, gradients, rho=rho, adaptive=False)
            assert length(plain) == pytest.approx(rho, rel=1e-6)
            adaptive = climb(weights, gradients, rho=rho, adaptive=True)
            relative = [step / w.abs() for step, w in zip(adaptive, weights, strict=True)]
            assert length(relative) == pytest.approx(rho, rel=1e-6)


def test_the_climb_computed_by_hand():
    weights, gradients = [torch.tensor([2.0, -1.0])], [torch.tensor([3.0, 4.0])]
    (plain,) = climb(weights, gradients, rho=5.0, adaptive=False)
    torch.testing.assert_close(plain, torch.tensor([3.0, 4.0]))
    # |w| g = (6, 4), of norm sqrt(52); w^2 g = (12, 4).
    (adaptive,) = climb(weights, gradients, rho=52**0.5, adaptive=True)
    torch.testing.assert_close(adaptive, torch.tensor([12.0, 4.0]))


def test_without_a_slope_nothing_moves():
    weights = draw((3,))
    for adaptive in (True, False):
        (step,) = climb(weights, [torch.zeros(3)], rho=2.0, adaptive=adaptive)
        assert torch.equal(step, torch.zeros(3))


def test_refused_climbs():
    with pytest.raises(ValueError, match="rho"):
        climb(draw((3,)), draw((3,)), rho=-1.0)
    with pytest.raises(ValueError, match="shapes"):
        climb(draw((3,)), draw((4,)), rho=1.0)
    with pytest.raises(ValueError, match="shapes"):
        climb([], [], rho=1.0)


@pytest.mark.parametrize("adaptive", [True, False])
def test_no_climb_is_plain_fine_tuning_bit_for_bit(adaptive):
    """With dropout and augmentation: both passes of a step see the same noise."""
    digits = planted_images(40)
    shared = {
        "steps": 6,
        "batch_size": 16,
        "lr": 0.01,
        "augmentation": "crop-flip",
        "label_smoothing": 0.1,
    }
    plain = FineTuning.preset(**shared).repair(net(), digits.images, digits.labels, seed=3)
    sam = FTSAM.preset(rho=0.0, adaptive=adaptive, **shared)
    still = sam.repair(net(), digits.images, digits.labels, seed=3)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(still.model.state_dict()[name], value), name
    assert plain.log["losses"] == still.log["losses"]
    moved = FTSAM.preset(rho=2.0, adaptive=adaptive, **shared)
    other = moved.repair(net(), digits.images, digits.labels, seed=3).model
    assert not torch.equal(other[5].weight, plain.model[5].weight)


def test_one_step_climbs_and_comes_back():
    """Weights are restored exactly, statistics move once, and the gradient is from the top."""
    digits = planted_images(16)
    model = net().train()
    start = [p.detach().clone() for p in model.parameters()]
    seen, gradients = [], []

    def closure():
        for p in model.parameters():
            p.grad = None
        loss = nn.functional.cross_entropy(model(digits.images), digits.labels)
        loss.backward()
        seen.append([p.detach().clone() for p in model.parameters()])
        gradients.append([p.grad.clone() for p in model.parameters()])
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    update = sam_update(model, rho=2.0, adaptive=True)
    update(optimizer, closure)
    assert len(seen) == 2
    for p, weight, at_first in zip(model.parameters(), start, seen[0], strict=True):
        assert torch.equal(p, weight) and torch.equal(at_first, weight)
    relative = [
        (top - weight)[weight != 0] / weight[weight != 0].abs()
        for top, weight in zip(seen[1], start, strict=True)
    ]
    assert length(relative) == pytest.approx(2.0, rel=1e-4)
    for p, gradient in zip(model.parameters(), gradients[1], strict=True):
        assert torch.equal(p.grad, gradient)
    assert int(model[1].num_batches_tracked) == 1
    once = net().train()
    once(digits.images)
    assert torch.equal(once[1].running_mean, model[1].running_mean)
    assert torch.equal(once[1].running_var, model[1].running_var)
    assert model[1].track_running_stats


def test_the_second_pass_draws_the_same_dropout():
    model = net().train()
    drawn = []

    def closure():
        drawn.append(torch.rand(3))
        loss = model(torch.zeros(4, 3, 16, 16)).square().mean()
        loss.backward()
        return loss

    sam_update(model, rho=0.1, adaptive=True)(torch.optim.SGD(model.parameters(), lr=0.1), closure)
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("adaptive", "wanted"), [(False, 1.25), (True, 1.1)])
def test_a_step_computed_by_hand(adaptive, wanted):
    """The loss w^2 at w = 2: up by 0.5, or by 0.5 * |w| = 1; then down by 0.15 of the slope 2w."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)

    def closure():
        optimizer.zero_grad()
        loss = model.weight.square().sum()
        loss.backward()
        return loss

    before = sam_update(model, rho=0.5, adaptive=adaptive)(optimizer, closure)
    assert before.item() == 4
    assert model.weight.item() == pytest.approx(wanted)


def test_published_settings():
    paper, gtsrb = FTSAM.preset("paper"), FTSAM.preset("paper-gtsrb")
    sgd = paper.sgd
    assert (paper.rho, paper.adaptive, sgd.label_smoothing) == (2.0, True, 0.1)
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (0.01, 0.9, 5e-4)
    assert (sgd.batch_size, sgd.schedule) == (256, "cosine")
    assert (gtsrb.rho, gtsrb.sgd.label_smoothing) == (8.0, 0.0)


@pytest.mark.parametrize("wrong", [{"rho": -1.0}, {"rho": float("inf")}], ids=str)
def test_refused_settings(wrong):
    with pytest.raises(ValueError, match="expected rho"):
        FTSAM.preset(**wrong)
