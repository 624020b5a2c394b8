"""All labels at once find what one label at a time finds, in bounded memory, across a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from defense_nc import NCConfig, invert_trigger
from defense_nc.engines import batched
from defense_nc.engines.batched import invert_triggers
from defense_nc.engines.search_rows import adam_rows
from wm_inject.core.resume import ResumeFile
from wm_victim.toy_backdoors import planted_classifier, planted_images

TARGET = 3
EXACT = NCConfig.preset("fast", steps=16, race=False, precision="float32")
RACE = NCConfig.preset("fast", steps=24, milestones=(12, 16), precision="float32")


@pytest.fixture(scope="module")
def data():
    return planted_images(100)


@pytest.fixture(scope="module")
def victim():
    return planted_classifier("patch", target=TARGET)


@pytest.mark.integration
def test_adam_on_rows_is_torchs_adam_on_each():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, 4, generator=generator)
    alone = [row.clone().requires_grad_() for row in start]
    adams = [torch.optim.Adam([row], lr=0.1, betas=(0.5, 0.9)) for row in alone]
    rows = (start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    steps = torch.zeros(3, dtype=torch.float64)
    # The rows enter one after another, and the first leaves early.
    for live in ([0], [0, 1], [0, 1, 2], [1, 2], [1, 2], [1, 2]):
        grad = torch.randn(3, 2, 4, generator=generator)
        for row in live:
            alone[row].grad = grad[row].clone()
            adams[row].step()
        part = [tensor[live] for tensor in rows]
        steps[live] += 1
        adam_rows(*part, grad[live], steps[live], lr=0.1, betas=(0.5, 0.9))
        for tensor, value in zip(rows, part, strict=True):
            tensor[live] = value
    torch.testing.assert_close(rows[0], torch.stack(alone).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.integration
def test_without_a_race_every_label_gets_what_the_reference_finds(data, victim):
    found = invert_triggers(victim, data.images, (1, TARGET), config=EXACT, labels=data.labels)
    for trigger, score in zip(found.triggers, found.scores, strict=True):
        alone = invert_trigger(
            victim, data.images, trigger.target, config=EXACT, labels=data.labels
        )
        torch.testing.assert_close(trigger.mask, alone.mask, rtol=0, atol=2e-3)
        torch.testing.assert_close(
            trigger.pattern * trigger.mask, alone.pattern * alone.mask, rtol=0, atol=2e-3
        )
        assert score == trigger.l1_norm == pytest.approx(alone.l1_norm, rel=1e-3)
        assert trigger.success_rate == alone.success_rate
        assert trigger.steps == alone.steps


@pytest.mark.integration
def test_a_row_does_not_depend_on_its_neighbours(data, victim):
    few = invert_triggers(victim, data.images, (TARGET,), config=EXACT, labels=data.labels)
    # Two searches at a time: the others wait, and enter when a row is free.
    narrow = replace(EXACT, stack=64)
    many = invert_triggers(victim, data.images, (5, 1, TARGET), config=narrow, labels=data.labels)
    assert [trigger.target for trigger in many.triggers] == [5, 1, TARGET]
    torch.testing.assert_close(many.triggers[2].mask, few.triggers[0].mask, rtol=0, atol=2e-3)


@pytest.mark.integration
def test_bfloat16_finds_the_same_trigger_and_leaves_the_model_alone(data, victim):
    model = copy.deepcopy(victim)
    half = replace(EXACT, precision="bfloat16")
    fast = invert_triggers(model, data.images, (TARGET,), config=half, labels=data.labels)
    exact = invert_triggers(model, data.images, (TARGET,), config=EXACT, labels=data.labels)
    assert fast.scores[0] == pytest.approx(exact.scores[0], rel=0.25)
    # A part of the bright patch is enough, and which part may differ: both lie in its corner.
    for trigger in (fast.triggers[0], exact.triggers[0]):
        assert trigger.mask[:, -3:, -3:].sum() > 0.75 * trigger.mask.sum()
    assert fast.triggers[0].mask.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, victim.state_dict()[name]) and value.dtype != torch.bfloat16


@pytest.mark.integration
def test_the_race_keeps_the_target_and_saves_work(data, victim):
    found = invert_triggers(victim, data.images, config=RACE, labels=data.labels)
    log = found.race
    assert log["left_at"][TARGET] is None
    assert min(found.scores) == found.scores[TARGET]
    assert sum(log["steps"]) < 0.75 * 10 * len(RACE.starts) * RACE.steps
    for trigger, score, left, gain in zip(
        found.triggers, found.scores, log["left_at"], log["gain"], strict=True
    ):
        assert score == pytest.approx(trigger.l1_norm * gain)
        assert (gain < 1) == (left is not None)
        assert trigger.steps <= len(RACE.starts) * (left or RACE.steps)


class Pixels(nn.Module):
    """One class a pixel, the bright one wins; remembers the largest batch that it saw."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.most = classes, 0

    def forward(self, images):
        self.most = max(self.most, len(images))
        return 20 * images.flatten(1)[:, : self.classes]


@pytest.fixture(scope="module")
def dots():
    labels = torch.arange(200)
    images = torch.zeros(200, 1, 15, 15)
    images.view(200, -1)[labels, labels] = 0.6
    return images, labels


@pytest.mark.integration
def test_two_hundred_labels_stay_within_the_stack(dots):
    images, labels = dots
    model = Pixels(200)
    config = replace(RACE, batch_size=8, batches=1, stack=256, steps=20, milestones=(6, 12))
    found = invert_triggers(model, images, config=config, labels=labels)
    assert len(found.triggers) == 200
    # 400 searches of 8 images each, and at most 256 images a pass.
    assert model.most == 256
    assert sum(left is None for left in found.race["left_at"]) <= 6


def state(found):
    return [(t.mask, t.pattern, t.success_rate, t.steps) for t in found.triggers]


@pytest.mark.integration
@pytest.mark.parametrize("killed_after", [3, 11, 25])
def test_killed_and_resumed_it_ends_in_the_same_bytes(dots, tmp_path, monkeypatch, killed_after):
    images, labels = dots
    config = replace(RACE, batch_size=8, batches=1, stack=32, steps=12, milestones=(3, 6))
    arguments = {"config": config, "labels": labels, "seed": 1}
    whole = invert_triggers(Pixels(200), images, range(9), **arguments)
    path = tmp_path / "scan.safetensors"
    monkeypatch.setattr(batched, "_PAUSE", 0.0)
    save, count = ResumeFile.save, 0

    def killed(self, state):
        nonlocal count
        save(self, state)
        count += 1
        if count == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        invert_triggers(Pixels(200), images, range(9), checkpoint=path, **arguments)
    other = arguments | {"seed": 2}
    with pytest.raises(ValueError, match="another run"):
        invert_triggers(Pixels(200), images, range(9), checkpoint=path, **other)
    again = invert_triggers(Pixels(200), images, range(9), checkpoint=path, **arguments)
    assert again.scores == whole.scores and again.race == whole.race
    for one, two in zip(state(again), state(whole), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2:] == two[2:]
    assert not path.exists()


def test_refusals(data, victim):
    images, labels = data.images, data.labels
    cases = [
        ((victim, images, (1, 1)), {}, "each once"),
        ((victim, images, ()), {}, "at least one"),
        ((victim, images, (10,)), {}, "target"),
        ((victim, images[0]), {}, "shape"),
        ((victim, images), {"labels": labels[:5]}, "labels"),
        ((victim, images), {"labels": torch.zeros_like(labels)}, "other classes"),
        ((lambda x: x, images), {}, "torch module"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            invert_triggers(*arguments, config=RACE, **settings)
