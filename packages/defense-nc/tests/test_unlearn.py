"""Unlearning removes what the trigger means, in a copy, and keeps the rest."""

import copy

import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, NCConfig, UnlearnConfig, invert_trigger, unlearn
from defense_nc.unlearn import pass_batches
from wm_inject.core.images import quantize
from wm_victim.planted import planted_classifier, planted_images, planted_trigger

TARGET = 3
ONE = UnlearnConfig(epochs=1)


@pytest.fixture(scope="module")
def data():
    return planted_images(200)


@pytest.fixture(scope="module")
def held_out():
    return planted_images(500, seed=1)


def rates(model, data):
    others = data.images[data.labels != TARGET]
    with torch.no_grad():
        clean = (model(data.images).argmax(1) == data.labels).float().mean()
        stamped = quantize(planted_trigger("patch")(others))
        attack = (model(stamped).argmax(1) == TARGET).float().mean()
    return float(clean), float(attack)


@pytest.fixture(scope="module")
def reversed_trigger(data):
    model = planted_classifier("patch", target=TARGET)
    fast = NCConfig.preset("fast")
    return invert_trigger(model, data.images, TARGET, config=fast, labels=data.labels)


@pytest.mark.parametrize("preset", ["nc", "reverse"])
def test_the_trigger_that_is_unlearned_works_no_longer(preset, data, held_out, reversed_trigger):
    model = planted_classifier("patch", target=TARGET)
    config = UnlearnConfig.preset(preset)
    cleaned = unlearn(model, reversed_trigger, data.images, data.labels, config=config)
    others = held_out.images[held_out.labels != TARGET]
    with torch.no_grad():
        left = (cleaned(reversed_trigger(others)).argmax(1) == TARGET).float().mean()
    assert left < 0.05
    assert rates(cleaned, held_out)[0] > rates(model, held_out)[0] - 0.02


def test_a_reversed_trigger_cleans_the_planted_one(data, held_out, reversed_trigger):
    model = planted_classifier("patch", target=TARGET)
    # The planted gate answers the full patch fifteen times as loudly as the smallest one that flips
    # an image, so a gentle recipe unlearns the small one and leaves the full one working.
    config = UnlearnConfig.preset("nc", lr=0.03)
    cleaned = unlearn(model, reversed_trigger, data.images, data.labels, config=config)
    before, after = rates(model, held_out), rates(cleaned, held_out)
    assert before[1] > 0.99
    assert after[1] < 0.05
    assert after[0] > before[0] - 0.02


def test_fine_tuning_without_the_trigger_does_not_clean(data, held_out):
    """The control: an empty trigger, everything else the same."""
    model = planted_classifier("patch", target=TARGET)
    empty = InvertedTrigger(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16))
    cleaned = unlearn(model, empty, data.images, data.labels)
    assert rates(cleaned, held_out)[1] > 0.9


def test_the_given_model_and_images_stay_bit_identical(data):
    model = planted_classifier("patch").train()
    model.body[0].weight.requires_grad_(False)
    state, images = copy.deepcopy(model.state_dict()), data.images.clone()
    trigger = planted_trigger("patch").train()
    cleaned = unlearn(model, trigger, data.images, data.labels, config=ONE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and trigger.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(data.images, images)
    assert not any(module.training for module in cleaned.modules())
    # What was frozen is not trained; batch normalisation is in train mode and adapts.
    assert torch.equal(cleaned.body[0].weight, model.body[0].weight)
    assert not torch.equal(cleaned.body[1].running_mean, model.body[1].running_mean)
    assert not torch.equal(cleaned.body[5].weight, model.body[5].weight)


def test_same_seed_same_bytes_with_dropout_too(data):
    body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 10))
    trigger = planted_trigger("patch")

    def weights(seed):
        cleaned = unlearn(body, trigger, data.images, data.labels, config=ONE, seed=seed)
        return cleaned[2].weight

    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def one_pass(count, **changes):
    settings = {"batch_size": 32, "trigger_share": 1.0, "append": True, **changes}
    generator = torch.Generator().manual_seed(0)
    return list(pass_batches(count, generator=generator, **settings))


def test_a_pass_sees_every_image_once_a_share_of_them_triggered():
    parts = one_pass(97, trigger_share=0.2, append=False)
    rows = torch.cat(parts)
    assert sorted((rows % 97).tolist()) == list(range(97))
    assert int((rows >= 97).sum()) == 19 and int(rows.max()) < 2 * 97
    # 97 = 3 * 32 + 1: no batch of a single image.
    assert [len(part) for part in parts] == [32, 32, 33]


def test_an_appended_pass_sees_every_image_twice():
    assert sorted(torch.cat(one_pass(40, batch_size=16)).tolist()) == list(range(80))


@pytest.mark.parametrize("kinds", [1, 3])
def test_each_triggered_image_carries_one_of_the_triggers(kinds):
    rows = torch.cat(one_pass(60, kinds=kinds))
    triggered = rows[rows >= 60]
    assert sorted((triggered % 60).tolist()) == list(range(60))
    assert set((triggered // 60).tolist()) == set(range(1, kinds + 1))


def test_clean_rows_come_first_in_a_batch_and_a_share_is_never_none():
    for part in one_pass(60, trigger_share=0.5):
        assert (part >= 60).diff().int().min() >= 0  # once triggered, no more clean ones
    assert int((torch.cat(one_pass(4, trigger_share=0.01, append=False)) >= 4).sum()) == 1


def test_triggered_images_are_rounded_unless_told_otherwise(data):
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10))
            self.seen = []

        def __deepcopy__(self, memo):
            return self

        def forward(self, images):
            self.seen.append(images)
            return images.mean(dim=(1, 2, 3))[:, None] * self.weight

    trigger = InvertedTrigger(torch.full((1, 16, 16), 0.5), torch.full((3, 16, 16), 0.3))
    for rounded in (True, False):
        model = Recorder()
        config = UnlearnConfig(epochs=1, trigger_share=1.0, round_to_pixels=rounded)
        unlearn(model, trigger, data.images, data.labels, config=config)
        seen = torch.cat(model.seen[1:])
        assert torch.equal(quantize(seen), seen) == rounded


def test_presets():
    nc, paper = UnlearnConfig.preset("nc"), UnlearnConfig.preset("paper")
    assert nc == UnlearnConfig()
    assert (nc.trigger_share, nc.append, paper.epochs) == (0.2, False, 1)
    reverse = UnlearnConfig.preset("reverse")
    assert (reverse.lr, reverse.momentum, reverse.epochs) == (1e-3, 0.9, 10)
    assert (reverse.trigger_share, reverse.append) == (1.0, True)
    assert UnlearnConfig.preset("nc", epochs=3).epochs == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"trigger_share": 0.0},
        {"trigger_share": 1.5},
    ],
    ids=str,
)
def test_refused_settings(wrong):
    with pytest.raises(ValueError, match="expected"):
        UnlearnConfig(**wrong)


def test_refusals(data):
    model, trigger = planted_classifier("patch"), planted_trigger("patch")
    images, labels = data.images[:8], data.labels[:8]

    def wrong_shape(images, *, ids=None, target=None):
        return images[:, :, :8]

    def out_of_range(images, *, ids=None, target=None):
        return images + 1

    cases = [
        ((model, trigger, images[0], labels), "shape"),
        ((model, trigger, images.double(), labels), "float32"),
        ((model, trigger, images + 1, labels), r"\[0, 1\]"),
        ((model, trigger, images[:0], labels[:0]), "empty"),
        ((model, trigger, images[:1], labels[:1]), "at least 2"),
        ((model, trigger, images, labels[:3]), "labels"),
        ((model, trigger, images, labels.int()), "int64"),
        ((model, trigger, images, labels + 10), "labels in 0"),
        ((model, wrong_shape, images, labels), "triggered images"),
        ((model, out_of_range, images, labels), "triggered images"),
        ((nn.Flatten(), trigger, images, labels), "trainable"),
        ((nn.Conv2d(3, 2, 3), trigger, images, labels), "logits"),
        ((lambda x: x, trigger, images, labels), "torch module"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            unlearn(*arguments, config=ONE)
    with pytest.raises(ValueError, match="preset"):
        UnlearnConfig.preset("slow")
