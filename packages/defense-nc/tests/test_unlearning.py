"""Unlearning removes what the trigger means, in a copy, and keeps the rest."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, NCConfig, Unlearning, invert_trigger
from defense_nc.mitigations import pass_batches
from wm_inject.core.images import quantize
from wm_victim.toy_backdoors import planted_classifier, planted_images, planted_trigger

TARGET = 3
ONE = Unlearning.preset("paper")  # one epoch


def unlearn(model, trigger, data, settings, seed=0):
    repaired = settings.repair(
        model, data.images, data.labels, triggers={TARGET: trigger}, seed=seed
    )
    return repaired.model


class Recorder(nn.Module):
    """Keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        if self.training:
            self.seen.append(images)
        return images.mean(dim=(1, 2, 3))[:, None] * self.weight


def recorded(data, triggers, **changes):
    model = Recorder()
    settings = Unlearning.preset("fast", **changes)
    settings.repair(model.train(), data.images, data.labels, triggers=triggers)
    return model.seen


def constant(value):
    return InvertedTrigger(torch.ones(1, 16, 16), torch.full((3, 16, 16), value))


@pytest.fixture(scope="module")
def data():
    return planted_images(200)


@pytest.fixture(scope="module")
def odd():
    return planted_images(97)


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


@pytest.mark.integration
@pytest.mark.parametrize("preset", ["nc", "reverse"])
def test_the_trigger_that_is_unlearned_works_no_longer(preset, data, held_out, reversed_trigger):
    model = planted_classifier("patch", target=TARGET)
    cleaned = unlearn(model, reversed_trigger, data, Unlearning.preset(preset))
    others = held_out.images[held_out.labels != TARGET]
    with torch.no_grad():
        left = (cleaned(reversed_trigger(others)).argmax(1) == TARGET).float().mean()
    assert left < 0.05
    assert rates(cleaned, held_out)[0] > rates(model, held_out)[0] - 0.02


@pytest.mark.integration
def test_a_reversed_trigger_cleans_the_planted_one(data, held_out, reversed_trigger):
    model = planted_classifier("patch", target=TARGET)
    # The planted gate answers the full patch fifteen times as loudly as the smallest one that flips
    # an image, so a gentle recipe unlearns the small one and leaves the full one working.
    cleaned = unlearn(model, reversed_trigger, data, Unlearning.preset("nc", lr=0.03))
    before, after = rates(model, held_out), rates(cleaned, held_out)
    assert before[1] > 0.99
    assert after[1] < 0.05
    assert after[0] > before[0] - 0.02


def test_fine_tuning_without_the_trigger_does_not_clean(data, held_out):
    """The control: an empty trigger, everything else the same."""
    model = planted_classifier("patch", target=TARGET)
    empty = InvertedTrigger(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16))
    cleaned = unlearn(model, empty, data, Unlearning.preset("nc"))
    assert rates(cleaned, held_out)[1] > 0.9


def test_the_given_model_and_images_stay_bit_identical(data):
    model = planted_classifier("patch").train()
    model.body[0].weight.requires_grad_(False)
    state, images = copy.deepcopy(model.state_dict()), data.images.clone()
    trigger = planted_trigger("patch").train()
    cleaned = unlearn(model, trigger, data, ONE)
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
        return unlearn(body, trigger, data, ONE, seed=seed)[2].weight

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


@pytest.mark.parametrize("append", [True, False])
def test_epochs_are_whole_passes_counted_in_steps(append, odd):
    """97 images: appended, 194 in 7 batches a pass; otherwise 97 in 3, the odd one joined."""
    changes = {"trigger_share": 1.0 if append else 0.2, "append": append}
    epochs = Unlearning.preset("nc", epochs=2, **changes)
    steps = 14 if append else 6
    assert epochs.steps(97) == steps
    counted = Unlearning.preset("nc", steps=steps, **changes)
    assert counted.epochs == 0 and counted.steps(97) == steps
    model, trigger = planted_classifier("patch"), planted_trigger("patch")
    first, second = (unlearn(model, trigger, odd, one, seed=5) for one in (epochs, counted))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_pass_shows_every_image_clean_and_triggered_by_all_suspects(odd):
    triggers = {2: constant(0.2), 7: constant(0.6), 4: constant(1.0)}
    seen = recorded(odd, triggers, steps=7, batch_size=32)
    assert [len(part) for part in seen] == [32] * 6 + [2]
    flat = torch.cat(seen).flatten(1)
    values = Counter(round(float(row[0]), 1) for row in flat if row.min() == row.max())
    assert sorted(values) == [0.2, 0.6, 1.0] and sum(values.values()) == 97
    assert min(values.values()) > 15


def test_a_share_in_place_of_clean_images(odd):
    seen = recorded(odd, {2: constant(1.0)}, steps=3, trigger_share=0.2, append=False)
    flat = torch.cat(seen).flatten(1)
    assert len(flat) == 97 and int((flat == 1).all(1).sum()) == 19


def test_steps_are_exact_and_batches_are_not_single(odd):
    seen = recorded(odd, {2: constant(1.0)}, steps=10, batch_size=64, append=False)
    assert len(seen) == 10 and min(len(part) for part in seen) > 1


@pytest.mark.parametrize("rounded", [True, False])
def test_triggered_images_are_rounded_unless_switched_off(rounded, odd):
    seen = recorded(odd, {2: constant(0.3)}, steps=4, round_to_pixels=rounded)
    images = torch.cat(seen)
    assert torch.equal(quantize(images), images) == rounded


def test_all_suspected_triggers_are_unlearned():
    """Two backdoors in one model: the planted one, and a bright top that a trigger asks for."""
    digits = planted_images(200)
    model = planted_classifier("patch", target=3)
    patch, channel = planted_trigger("patch"), planted_trigger("channel")
    repaired = Unlearning.preset(steps=60, lr=0.02).repair(
        model, digits.images, digits.labels, triggers={3: patch, 5: channel}
    )
    assert repaired.log["labels"] == [3, 5]
    others = digits.images[digits.labels != 3]
    with torch.no_grad():
        before = (model(patch(others)).argmax(1) == 3).float().mean()
        after = (repaired.model(patch(others)).argmax(1) == 3).float().mean()
    assert before > 0.99 and after < 0.05


def test_without_suspects_the_copy_stays_as_it_is(odd):
    model = planted_classifier("clean").train()
    repaired = Unlearning().repair(model, odd.images, odd.labels, triggers={})
    assert repaired.model is not model and not repaired.model.training and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(repaired.model.state_dict()[name], value)
    assert repaired.log == {"steps": 0, "labels": [], "losses": []}


def test_published_settings():
    paper, nc, reverse = (Unlearning.preset(name) for name in ("paper", "nc", "reverse"))
    assert (paper.epochs, nc.epochs, reverse.epochs) == (1, 10, 10)
    assert nc == Unlearning.preset("paper", epochs=10)
    assert (nc.trigger_share, nc.append, nc.sgd.lr) == (0.2, False, 1e-2)
    assert (reverse.trigger_share, reverse.append, reverse.sgd.lr) == (1.0, True, 1e-3)
    assert nc.sgd.momentum == reverse.sgd.momentum == 0.9
    assert paper.steps(5000) == -(-5000 // 32) and reverse.steps(2500) == 10 * -(-5000 // 32)


def test_refused_settings(subtests):
    for wrong in [{"epochs": -1}, {"trigger_share": 0.0}, {"trigger_share": 1.5}]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match=next(iter(wrong))):
            Unlearning(**wrong)


def test_refusals(data):
    def wrong_shape(images, *, ids=None, target=None):
        return images[:, :, :8]

    def out_of_range(images, *, ids=None, target=None):
        return images + 1

    cases = [
        (None, "got None"),
        ({10: planted_trigger("patch")}, "labels in 0 .. 9"),
        ({-1: planted_trigger("patch")}, "labels in 0 .. 9"),
        ({1: wrong_shape}, "triggered images"),
        ({1: out_of_range}, "triggered images"),
    ]
    for triggers, message in cases:
        with pytest.raises(ValueError, match=message):
            ONE.repair(planted_classifier(), data.images, data.labels, triggers=triggers)
