"""What all mitigations have in common: one signature, a changed copy only, clear refusals."""

import copy
import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from defense_nc import Unlearning
from defense_nc.mitigations import Sgd, fine_tune, learning_rate
from defense_reverse.mitigations import FTSAM, NAD, FeatureShiftTuning, FinePruning, FineTuning
from wm_victim import CLASSIFIERS, build_classifier
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

KINDS = [FineTuning, NAD, FinePruning, FTSAM, FeatureShiftTuning, Unlearning]
TRIGGERS = {0: planted_trigger("patch")}


@pytest.fixture(scope="module")
def data():
    return planted_images(40)


def net():
    """A tiny network with two stages, batch normalisation and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 10)),
        )


def quick(kind, **changes):
    return kind.preset(steps=4, batch_size=16, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_model_stays_bit_identical(kind, data):
    model = net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[9].bias.grad = torch.ones(10)
    state, images = copy.deepcopy(model.state_dict()), data.images.clone()
    repaired = quick(kind).repair(model, data.images, data.labels, triggers=TRIGGERS).model
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training and not model[1].training and not model[0].weight.requires_grad
    assert model[9].weight.requires_grad and torch.equal(model[9].bias.grad, torch.ones(10))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(data.images, images)
    # The copy: in eval mode, frozen layers bit-identical, the others and the statistics trained.
    assert not any(module.training for module in repaired.modules())
    assert torch.equal(repaired[0].weight, model[0].weight)
    assert not torch.equal(repaired[3].weight, model[3].weight)
    assert not torch.equal(repaired[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes_with_dropout_and_augmentation_too(kind, data):
    mitigator = quick(kind, augmentation="crop-flip")

    def weights(seed):
        repaired = mitigator.repair(net(), data.images, data.labels, triggers=TRIGGERS, seed=seed)
        return repaired.model.state_dict(), repaired.log

    before = torch.get_rng_state()
    first, log = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, same = weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first) and log == same
    other, _ = weights(2)
    assert not torch.equal(first["3.weight"], other["3.weight"])


def test_the_loss_decreases_and_the_log_is_ready_for_json(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            digits = planted_images(120)
            mitigator = kind.preset(steps=40, batch_size=32, lr=0.02, schedule="constant")
            repaired = mitigator.repair(net(), digits.images, digits.labels, triggers=TRIGGERS)
            assert json.loads(json.dumps(repaired.log)) == repaired.log
            assert repaired.log["steps"] == 40
            losses = repaired.log["losses"]
            assert len(losses) == 10 and losses[-1] < losses[0]


# The layers of some differ only to methods that look inside.
@pytest.mark.integration
def test_every_classifier_of_the_house_can_be_repaired(subtests):
    for kind, name in [
        (kind, name)
        for kind in KINDS
        for name in CLASSIFIERS
        if kind in (NAD, FinePruning) or not name.startswith(("pre", "resnet18"))
    ]:
        with subtests.test(kind=kind, name=name):
            channels, size = (1, 28) if name == "wanet-mnist" else (3, 32)
            model = build_classifier(
                name, num_classes=3, channels=channels, image_size=size, width=8
            )
            images = torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0))
            mitigator = kind.preset(steps=2, batch_size=4)
            repaired = mitigator.repair(model, images, torch.arange(4) % 3, triggers={})
            with torch.no_grad():
                assert repaired.model(images).shape == (4, 3)
            if kind is NAD:
                assert len(repaired.log["layers"]) == 3
            if kind is FinePruning:
                assert repaired.log["in_weights"] is True


def test_presets(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            fast, paper = kind.preset("fast"), kind.preset("paper")
            assert kind.preset() == fast == kind()
            assert paper != fast and paper.sgd.momentum == 0.9
            assert kind.preset("paper", lr=0.5) == replace(paper, sgd=replace(paper.sgd, lr=0.5))
            sgd = Sgd(lr=0.3)
            assert kind.preset("fast", sgd=sgd, steps=7).sgd == replace(sgd, steps=7)
            with pytest.raises(ValueError, match="expected a preset"):
                kind.preset("slow")
            with pytest.raises(ValueError, match="soap"):
                kind.preset("fast", soap=1)
            with pytest.raises(FrozenInstanceError):
                fast.sgd = sgd


def test_names():
    names = [kind().name for kind in KINDS]
    assert names == ["fine-tuning", "nad", "fine-pruning", "ft-sam", "fst", "unlearning"]


def test_refused_settings(subtests):
    for kind in KINDS:
        for wrong in [
            {"steps": 0},
            {"batch_size": 1},
            {"lr": 0.0},
            {"lr": float("inf")},
            {"momentum": 1.0},
            {"momentum": 0.0, "nesterov": True},
            {"weight_decay": -1.0},
            {"schedule": "linear"},
            {"augmentation": "cutout"},
            {"label_smoothing": 1.0},
        ]:
            with subtests.test(kind=kind, wrong=wrong), pytest.raises(ValueError, match="expected"):
                kind.preset(**wrong)


def test_refused_input(data, subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            model, images, labels = net(), data.images[:8], data.labels[:8]
            cases = [
                ((lambda x: x, images, labels), "torch module"),
                ((model, images[0], labels), "shape"),
                ((model, images.double(), labels), "float32"),
                ((model, images + 1, labels), r"\[0, 1\]"),
                ((model, images[:0], labels[:0]), "empty"),
                ((model, images[:1], labels[:1]), "at least 2"),
                ((model, images, labels[:3]), "labels"),
                ((model, images, labels.int()), "int64"),
                ((model, images, labels + 10), "labels in 0"),
                ((nn.Flatten(), images, labels), "trainable"),
                ((nn.Conv2d(3, 2, 3), images, labels), "logits"),
            ]
            for arguments, message in cases:
                with pytest.raises(ValueError, match=message):
                    quick(kind).repair(*arguments, triggers=TRIGGERS)


def test_the_schedules_at_known_steps():
    def rates(schedule):
        sgd = Sgd(steps=20, batch_size=2, lr=0.4, schedule=schedule)
        return [learning_rate(sgd, step) for step in (0, 1, 2, 10, 20)]

    assert rates("constant") == [0.4] * 5
    assert rates("drop") == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.04])
    assert rates("cosine") == pytest.approx([0.4, 0.397538, 0.390211, 0.2, 0.0], abs=1e-6)


def test_a_step_of_sgd_is_the_one_written_down(data):
    """One linear layer, one step over all images: w - lr * (gradient + decay * w)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    weight = model[1].weight.detach().clone()
    loss = nn.functional.cross_entropy(model(data.images), data.labels)
    (gradient,) = torch.autograd.grad(loss, model[1].weight)
    sgd = Sgd(steps=1, batch_size=40, lr=0.5, momentum=0.0, weight_decay=0.1)
    losses = fine_tune(model, data.images, data.labels, sgd=sgd, seed=0)
    torch.testing.assert_close(model[1].weight, weight - 0.5 * (gradient + 0.1 * weight))
    assert losses == pytest.approx([loss.item()])


def test_a_loss_that_explodes_is_said(data):
    mitigator = FineTuning.preset(steps=20, lr=1e30, schedule="constant")
    with pytest.raises(RuntimeError, match="lower learning rate than 1e"):
        mitigator.repair(net(), data.images, data.labels)


@pytest.mark.integration
def test_plain_fine_tuning_leaves_the_planted_backdoor_and_unlearning_does_not():
    """The control and the cure, after as many steps at the same rate."""
    model, patch = planted_classifier("patch"), planted_trigger("patch")
    digits, held_out = planted_images(200), planted_images(300, seed=1)
    others = patch(held_out.images[held_out.labels != 0])
    success = {}
    for kind in (FineTuning, Unlearning):
        mitigator = kind.preset(steps=70, schedule="constant", weight_decay=0.0)
        tuned = mitigator.repair(model, digits.images, digits.labels, triggers={0: patch}).model
        with torch.no_grad():
            success[kind] = float((tuned(others).argmax(1) == 0).float().mean())
            right = tuned(held_out.images).argmax(1) == held_out.labels
        assert right.float().mean() > 0.9
    assert success[FineTuning] > 0.9
    assert success[Unlearning] < 0.05
