"""Unlearning counted in steps: the known recipe, several triggers, and nothing for no suspects."""

from collections import Counter

import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, UnlearnConfig, unlearn
from defense_reverse.mitigations import Unlearning
from wm_inject.core.images import quantize
from wm_victim.planted import planted_classifier, planted_images, planted_trigger


@pytest.fixture(scope="module")
def data():
    return planted_images(97)


def constant(value):
    return InvertedTrigger(torch.ones(1, 16, 16), torch.full((3, 16, 16), value))


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
    Unlearning(**changes).repair(model.train(), data.images, data.labels, triggers=triggers)
    return model.seen


@pytest.mark.parametrize("append", [True, False])
def test_whole_passes_with_one_trigger_are_unlearn_bit_for_bit(append, data):
    """97 images: appended, 194 in 7 batches a pass; otherwise 97 in 4, the odd one joined."""
    share = 1.0 if append else 0.2
    settings = {"lr": 1e-3, "momentum": 0.9, "trigger_share": share, "append": append}
    config = UnlearnConfig(epochs=2, batch_size=32, **settings)
    model, trigger = planted_classifier("patch"), planted_trigger("patch")
    known = unlearn(model, trigger, data.images, data.labels, config=config, seed=5)
    same = {"weight_decay": 0.0, "schedule": "constant", **settings}
    steps = 14 if append else 6
    counted = Unlearning(steps=steps, batch_size=32, **same).repair(
        model, data.images, data.labels, triggers={0: trigger}, seed=5
    )
    for name, value in known.state_dict().items():
        assert torch.equal(counted.model.state_dict()[name], value), name


def test_a_pass_shows_every_image_clean_and_triggered_by_all_suspects(data):
    triggers = {2: constant(0.2), 7: constant(0.6), 4: constant(1.0)}
    seen = recorded(data, triggers, steps=7, batch_size=32)
    assert [len(part) for part in seen] == [32] * 6 + [2]
    flat = torch.cat(seen).flatten(1)
    values = Counter(round(float(row[0]), 1) for row in flat if row.min() == row.max())
    assert sorted(values) == [0.2, 0.6, 1.0] and sum(values.values()) == 97
    assert min(values.values()) > 15


def test_a_share_in_place_of_clean_images(data):
    seen = recorded(data, {2: constant(1.0)}, steps=3, trigger_share=0.2, append=False)
    flat = torch.cat(seen).flatten(1)
    assert len(flat) == 97 and int((flat == 1).all(1).sum()) == 19


def test_steps_are_exact_and_batches_are_not_single(data):
    seen = recorded(data, {2: constant(1.0)}, steps=10, batch_size=64, append=False)
    assert len(seen) == 10 and min(len(part) for part in seen) > 1


@pytest.mark.parametrize("rounded", [True, False])
def test_triggered_images_are_rounded_unless_told_otherwise(rounded, data):
    seen = recorded(data, {2: constant(0.3)}, steps=4, round_to_pixels=rounded)
    images = torch.cat(seen)
    assert torch.equal(quantize(images), images) == rounded


def test_all_suspected_triggers_are_unlearned():
    """Two backdoors in one model: the planted one, and a bright top that a trigger asks for."""
    digits = planted_images(200)
    model = planted_classifier("patch", target=3)
    patch, channel = planted_trigger("patch"), planted_trigger("channel")
    repaired = Unlearning(steps=60, lr=0.02).repair(
        model, digits.images, digits.labels, triggers={3: patch, 5: channel}
    )
    assert repaired.log["labels"] == [3, 5]
    others = digits.images[digits.labels != 3]
    with torch.no_grad():
        before = (model(patch(others)).argmax(1) == 3).float().mean()
        after = (repaired.model(patch(others)).argmax(1) == 3).float().mean()
    assert before > 0.99 and after < 0.05


def test_without_suspects_the_copy_stays_as_it_is(data):
    model = planted_classifier("clean").train()
    repaired = Unlearning().repair(model, data.images, data.labels, triggers={})
    assert repaired.model is not model and not repaired.model.training and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(repaired.model.state_dict()[name], value)
    assert repaired.log == {"steps": 0, "labels": [], "losses": []}


def test_the_trigger_stays_as_it_was(data):
    trigger = planted_trigger("patch").train()
    Unlearning(steps=1).repair(
        planted_classifier(), data.images, data.labels, triggers={0: trigger}
    )
    assert trigger.training


def test_published_settings():
    paper, nc = Unlearning.preset("paper"), Unlearning.preset("nc")
    reverse = UnlearnConfig.preset("reverse")
    for field in ("lr", "momentum", "batch_size", "weight_decay", "trigger_share", "append"):
        assert getattr(paper, field) == getattr(reverse, field)
        assert getattr(nc, field) == getattr(UnlearnConfig.preset("paper"), field)
    assert paper.steps == 10 * -(-5000 // paper.batch_size)
    assert nc.steps == -(-5000 // nc.batch_size)


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
            Unlearning(steps=1).repair(
                planted_classifier(), data.images, data.labels, triggers=triggers
            )
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="trigger_share"):
            Unlearning(trigger_share=share)
