"""Attention maps with known values, and a student that learns from an unchanged teacher."""

import copy

import pytest
import torch
from torch import nn

from defense_reverse.mitigations import NAD, FineTuning
from defense_reverse.mitigations.nad import attention_loss, attention_map
from wm_victim import build_classifier
from wm_victim.toy_backdoors import planted_classifier, planted_images


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_attention_map_computed_by_hand():
    maps = torch.tensor([[[[1.0, -2.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 2.0]]]])
    # 1, 4, 0, 4 + 4 = 8: the norm is 9.
    wanted = torch.tensor([[[1.0, 4.0], [0.0, 8.0]]]) / 9
    torch.testing.assert_close(attention_map(maps), wanted)
    # p = 1: 1, 2, 0, 4, of norm sqrt(21).
    wanted = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]) / 21**0.5
    torch.testing.assert_close(attention_map(maps, power=1.0), wanted)


def test_the_loss_computed_by_hand():
    student = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]])
    teacher = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 5.0]]]])
    # The first image looks elsewhere (1, 0) against (0, 1); the second at the same place.
    assert attention_loss(student, teacher).item() == pytest.approx((1 + 1 + 0 + 0) / 4, abs=1e-5)


def test_the_map_has_unit_norm_and_forgets_the_scale(subtests):
    for power in [1.0, 2.0, 4.0]:
        with subtests.test(power=power):
            maps = draw(3, 5, 4, 6)
            attention = attention_map(maps, power=power)
            assert attention.shape == (3, 4, 6) and float(attention.min()) >= 0
            norm = torch.linalg.vector_norm(attention, dim=(1, 2))
            torch.testing.assert_close(norm, torch.ones(3), atol=1e-5, rtol=0)
            torch.testing.assert_close(attention_map(7 * maps, power=power), attention)
            torch.testing.assert_close(attention_map(-maps, power=power), attention)


def test_maps_of_zeros_have_no_attention_and_a_finite_gradient():
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention = attention_map(maps)
    assert float(attention.detach().abs().max()) == 0
    attention.sum().backward()
    assert bool(torch.isfinite(maps.grad).all())


def test_equal_maps_have_no_distance():
    assert attention_loss(draw(2, 3, 4, 4), draw(2, 3, 4, 4)).item() == 0
    # Another number of channels is allowed: the maps are sums over them.
    assert attention_loss(draw(2, 3, 4, 4), draw(2, 5, 4, 4)).item() > 0


def test_maps_without_places_are_refused(subtests):
    for shape in [(2, 8, 1, 1), (2, 8), (2, 8, 4)]:
        with subtests.test(shape=shape):
            message = "more than one pixel" if shape[2:] == (1, 1) else "shape"
            with pytest.raises(ValueError, match=message):
                attention_map(torch.ones(shape))


def test_other_refusals():
    with pytest.raises(ValueError, match="float"):
        attention_map(torch.ones(2, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="power"):
        attention_map(draw(2, 3, 4, 4), power=0.0)
    with pytest.raises(ValueError, match="one shape"):
        attention_loss(draw(2, 3, 4, 4), draw(2, 3, 4, 5))


@pytest.mark.integration
def test_identical_networks_leave_cross_entropy_alone():
    digits = planted_images(16)
    model = planted_classifier()
    nad, layers = NAD(), ["body.2", "body.3"]
    loss = nad._loss(model, copy.deepcopy(model), layers, nad.sgd)
    plain = nn.functional.cross_entropy(model(digits.images), digits.labels)
    assert torch.equal(loss(digits.images, digits.labels), plain)


@pytest.mark.integration
def test_betas_weigh_the_layers():
    """The loss is linear in each beta, and each layer has its own."""
    digits = planted_images(16)
    student, teacher = planted_classifier(), planted_classifier(seed=1)
    layers = ["body.2", "body.3"]

    def total(*betas):
        nad = NAD.preset(betas=betas)
        with torch.no_grad():
            loss = nad._loss(student, teacher, layers, nad.sgd)(digits.images, digits.labels)
        return loss.double()

    base, one, other = total(0.0, 0.0), total(1.0, 0.0), total(0.0, 1.0)
    first, second = one - base, other - base
    assert first > 0 and second > 0
    # Each loss comes in float32, some roundings off, and enters as often as it is multiplied.
    error = 4 * torch.finfo(torch.float32).eps * float(4 * base + 2 * one + 3 * other)
    # With one beta too many the first is left out.
    wanted = base + 2 * first + 3 * second
    torch.testing.assert_close(total(9.0, 2.0, 3.0), wanted, rtol=0, atol=error)


def test_the_teacher_is_plain_fine_tuning_and_stays_as_it_was(monkeypatch):
    """Only the student is trained on the maps; its batch statistics move once a step."""
    digits = planted_images(64)
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8)
    teachers = []
    build = NAD._loss

    def spy(self, student, teacher, layers, sgd):
        teachers.append((teacher, copy.deepcopy(teacher.state_dict())))
        assert not teacher.training
        return build(self, student, teacher, layers, sgd)

    monkeypatch.setattr(NAD, "_loss", spy)
    nad = NAD.preset(steps=6, batch_size=32, weight_decay=5e-4, nesterov=False)
    repaired = nad.repair(model, digits.images, digits.labels)
    ((teacher, state),) = teachers
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    alone = FineTuning.preset(steps=2, batch_size=32, lr=nad.sgd.lr).repair(
        model, digits.images, digits.labels
    )
    assert all(torch.equal(state[name], v) for name, v in alone.model.state_dict().items())
    counted = repaired.model.body.stem[1].num_batches_tracked
    assert int(counted - model.body.stem[1].num_batches_tracked) == 4
    assert len(repaired.log["teacher_losses"]) == 2 and len(repaired.log["losses"]) == 4


@pytest.mark.integration
def test_distillation_brings_the_maps_together():
    digits = planted_images(64)
    model = build_classifier("resnet10", num_classes=10, channels=3, image_size=16, width=8)
    images, labels = digits.images, digits.labels
    far, near = (
        NAD.preset(steps=30, lr=0.01, betas=betas).repair(model, images, labels).log["losses"]
        for betas in ((0.0,), (1000.0,))
    )
    # Without maps only cross-entropy is counted; with them the larger sum falls as well.
    assert near[0] > far[0] and near[-1] < near[0]


def test_published_settings():
    paper = NAD.preset("paper")
    sgd = paper.sgd
    assert (sgd.steps, sgd.batch_size, sgd.lr, sgd.schedule) == (1200, 64, 0.1, "drop")
    assert (sgd.momentum, sgd.weight_decay, sgd.nesterov) == (0.9, 1e-4, True)
    assert paper.betas == (500.0, 1000.0, 1000.0) and paper.power == 2
    assert round(paper.teacher_share * sgd.steps) == 400  # ten passes of twenty and ten


def test_chosen_layers():
    digits = planted_images(8)
    repaired = NAD.preset(steps=2, betas=(1.0,), layers=("body.2",)).repair(
        planted_classifier(), digits.images, digits.labels
    )
    assert repaired.log["layers"] == ["body.2"]


def test_layers_without_maps_are_refused(subtests):
    for layers, message in [
        (("body.9",), "expected a layer"),
        (("body.4",), "shape"),  # flattened
        (("unused",), "run in the model"),
    ]:
        with subtests.test(layers=layers, message=message):
            digits = planted_images(8)
            model = planted_classifier()
            model.unused = nn.Conv2d(3, 3, 1)
            with pytest.raises(ValueError, match=message):
                NAD.preset(steps=2, betas=(1.0,), layers=layers).repair(
                    model, digits.images, digits.labels
                )


def test_a_network_without_maps_is_refused():
    digits = planted_images(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with pytest.raises(ValueError, match="convolutional maps"):
        NAD.preset(steps=2).repair(model, digits.images, digits.labels)


def test_refused_settings(subtests):
    for wrong in [
        {"steps": 1},
        {"teacher_share": 0.0},
        {"teacher_share": 1.0},
        {"power": 0.0},
        {"betas": ()},
        {"betas": (-1.0,)},
        {"betas": (1.0, 2.0), "layers": ("body.2",)},
    ]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected"):
            NAD.preset(**wrong)
