"""Marksman: the trigger, and the two stages of its training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from wm_inject import build_trigger, load_trigger, quantize, save_trigger
from wm_inject.attacks.marksman import (
    WIDTHS,
    MarksmanConfig,
    MarksmanHook,
    MarksmanTrigger,
    other_labels,
)
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.resume import load_state, save_state

CLASSES = 5
PLAN = PoisonPlan(0.5, mode="per_batch")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 12, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=generator(1)) * 0.8 + 0.1


def labels(n: int = 12) -> torch.Tensor:
    return torch.arange(n) % CLASSES


def fresh(**settings) -> MarksmanTrigger:
    usual = {"image_size": 16, "channels": 3, "num_classes": CLASSES, "width": 4}
    return MarksmanTrigger(**{**usual, **settings})


def settled() -> MarksmanTrigger:
    """A generator whose running statistics are those of its inputs, as after training."""
    trigger = fresh().train()
    with torch.no_grad():
        for _ in range(30):
            trigger(batch(40), target=labels(40))
    return trigger.eval()


def victim(channels: int = 3, classes: int = CLASSES, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)),
        )


def hook_of(trigger: MarksmanTrigger | None = None, *, stage: int = 1, **settings) -> MarksmanHook:
    trigger = fresh() if trigger is None else trigger
    return MarksmanHook(
        trigger,
        PLAN,
        num_classes=trigger.config["num_classes"],
        config=MarksmanConfig.preset("tiny", **settings),
        train_generator=stage == 1,
    )


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_published_generator_has_358279_weights():
    trigger = MarksmanTrigger(image_size=32, channels=3, num_classes=10, width=WIDTHS["paper"])
    assert sum(p.numel() for p in trigger.parameters()) == 358_279


def test_every_size_keeps_shape_range_and_bound(subtests):
    for size in [9, 28, 32, 64, 160, 224]:
        for channels in [1, 3]:
            with subtests.test(size=size, channels=channels):
                trigger = fresh(image_size=size, channels=channels, epsilon=0.03)
                for images in (torch.ones(2, channels, size, size), batch(2, channels, size)):
                    before = images.clone()
                    with torch.no_grad():
                        out = trigger(images, target=torch.tensor([0, 4]))
                    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
                    assert (out - images).abs().max() <= 0.03 + 1e-6
                    assert torch.equal(images, before)
                assert not torch.equal(out, images)


def test_the_bound_holds_however_large_the_weights_are():
    trigger, images = fresh(epsilon=0.05), batch()
    with torch.no_grad():
        for weight in trigger.parameters():
            weight.mul_(30)
        change = trigger(images, target=labels()) - images
    assert 0.04 < change.abs().max() <= 0.05 + 1e-6


def test_other_classes_and_other_images_get_other_changes():
    trigger, images = settled(), batch(4)
    with torch.no_grad():
        change = [trigger(images, target=torch.full((4,), c)) - images for c in range(CLASSES)]
    for c in range(1, CLASSES):
        assert (change[c] - change[0]).abs().flatten(1).amax(1).min() > 1e-5
    assert (change[0][1] - change[0][0]).abs().max() > 1e-5


def test_the_class_reaches_the_change():
    trigger = fresh()
    trigger(batch(), target=labels()).square().sum().backward()
    gradient = trigger.embedding.weight.grad
    assert gradient is not None and bool((gradient.abs().amax(1) > 0).all())
    assert trigger.plane.weight.grad.abs().max() > 0


def test_the_batch_does_not_matter_and_the_seed_does():
    trigger, images = fresh(), batch()
    with torch.no_grad():
        together = trigger(images, target=labels())
        alone = [trigger(images[i : i + 1], target=labels()[i : i + 1]) for i in range(12)]
        again, other = (fresh(seed=s)(images, target=labels()) for s in (0, 1))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    assert torch.equal(together, again) and not torch.equal(together, other)
    before = torch.random.get_rng_state()
    fresh()
    assert torch.equal(before, torch.random.get_rng_state())


def test_settings_and_files_bring_it_back(tmp_path):
    trigger = fresh()
    json.dumps(trigger.config)
    save_trigger(trigger, tmp_path / "t.safetensors")
    loaded = load_trigger(tmp_path / "t.safetensors")
    again = build_trigger("marksman", trigger.config, state=trigger.state_dict())
    with torch.no_grad():
        want = trigger(batch(), target=labels())
        assert torch.equal(loaded(batch(), target=labels()), want)
        assert torch.equal(again(batch(), target=labels()), want)
    assert loaded.needs_target and not loaded.training and "epsilon=0.05" in repr(loaded)


def test_trigger_refuses_settings(subtests):
    for bad in [
        {"image_size": 0},
        {"channels": 2},
        {"num_classes": 1},
        {"num_classes": 10**6},
        {"epsilon": 0.0},
        {"epsilon": 1.1},
        {"epsilon": float("nan")},
        {"width": 0},
        {"width": 10**6},
        {"seed": -1},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            fresh(**bad)


def test_trigger_refuses_data(subtests):
    for images, target in [
        (batch(), None),
        (batch(), labels(11)),
        (batch(), labels() + 1),
        (batch(), labels() - 1),
        (batch(), labels().float()),
        (batch(), 3),
        (batch(channels=1), labels()),
        (batch(size=32), labels()),
        (batch() + 1, labels()),
        (batch()[:0], labels()[:0]),
    ]:
        with (
            subtests.test(images=images, target=target),
            pytest.raises(ValueError, match="expected"),
        ):
            fresh()(images, target=target)


def test_no_image_asks_for_its_own_class_and_all_others_come_up_evenly():
    true = torch.arange(4000) % 4
    asked = other_labels(true, 4, generator=generator())
    assert not bool((asked == true).any()) and asked.min() == 0 and asked.max() == 3
    counts = torch.zeros(4, 4).index_put((true, asked), torch.ones(4000), accumulate=True)
    assert bool((counts.diagonal() == 0).all())
    # 1000 draws over three classes: four standard deviations are 60.
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 1000 / 3).abs().max() < 60
    assert other_labels(torch.tensor([0, 1]), 2, generator=generator()).tolist() == [1, 0]


def test_other_labels_refuses():
    with pytest.raises(ValueError, match="at least 2 classes"):
        other_labels(torch.zeros(3, dtype=torch.int64), 1, generator=generator())
    with pytest.raises(ValueError, match="expected labels"):
        other_labels(torch.tensor([4]), 4, generator=generator())


def test_half_of_a_batch_is_poisoned(subtests):
    for stage in [1, 2]:
        for n, poisoned in [(12, 6), (13, 6), (2, 1), (1, 0)]:
            with subtests.test(stage=stage, n=n, poisoned=poisoned):
                trigger = fresh()
                poisoner, images, true = copy.deepcopy(trigger), batch(n), labels(n)
                before = images.clone(), true.clone()
                hook = hook_of(trigger, stage=stage)
                out, new = hook.transform(images, true, model=victim(), generator=generator())
                assert torch.equal(images, before[0]) and torch.equal(true, before[1])
                assert out.shape == images.shape and not out.requires_grad
                attacked = new != true
                assert int(attacked.sum()) == poisoned
                assert torch.equal(out[~attacked], images[~attacked])
                if poisoned:
                    with torch.no_grad():
                        wanted = poisoner(images[attacked], target=new[attacked])
                    torch.testing.assert_close(out[attacked], wanted, rtol=0, atol=0.5 / 255 + 1e-5)
                    assert torch.equal(out[attacked], quantize(out[attacked]))


@pytest.mark.integration
def test_a_batch_follows_its_generator():
    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return hook_of().transform(batch(), labels(), model=victim(), generator=generator(seed))

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("training", [True, False])
def test_the_victim_is_untouched_by_the_generators_step(training):
    model = victim().train(training)
    model[1].eval()  # a part in another mode than the whole
    F.cross_entropy(model(batch()), labels()).backward()
    before = weights(model), [p.grad.clone() for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    hook = hook_of()
    old = weights(hook.trigger)
    with torch.no_grad():  # whatever the trainer does around it
        hook.transform(batch(), labels(), model=model, generator=generator())
    assert not same(old, weights(hook.trigger))
    assert same(before[0], weights(model))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert modes == [part.training for part in model.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_the_poisoning_copy_waits_for_its_refresh():
    hook, model = hook_of(refresh_steps=3), victim()
    first = weights(hook.poisoner)
    for step in range(1, 7):
        hook.transform(batch(), labels(), model=model, generator=generator(step))
        now = weights(hook.poisoner)
        if step < 3:
            assert same(now, first) and not same(now, weights(hook.trigger))
        if step == 3:
            second = weights(hook.trigger)
            assert not same(second, first)
        if 3 <= step < 6:
            assert same(now, second)
    assert same(now, weights(hook.trigger)) and not same(now, second)
    assert not hook.trigger.training and not hook.poisoner.training


def test_a_generator_step_lowers_the_loss_it_is_for():
    hook, model = hook_of(lr=1e-3), victim().eval()
    images, asked = batch(), (labels() + 1) % CLASSES

    def loss() -> float:
        with torch.no_grad():
            hook.trigger.train()
            value = F.cross_entropy(model(hook.trigger(images, target=asked)), asked)
            hook.trigger.eval()
        return float(value)

    before = loss()
    for _ in range(5):
        hook._learn(hook.optimizer, images, asked, model)
    assert loss() < before


def test_stage_two_leaves_the_generator_alone():
    hook = hook_of(stage=2)
    before, model = weights(hook.trigger), victim()
    for step in range(3):
        hook.transform(batch(), labels(), model=model, generator=generator(step))
    assert same(before, weights(hook.trigger)) and set(hook.state_dict()) == {"trigger"}


def train(
    model: nn.Module,
    hook: MarksmanHook,
    data: tuple[torch.Tensor, torch.Tensor],
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in steps:
        draw = generator(step)
        index = torch.randperm(len(data[0]), generator=draw)[:32]
        images, wanted = data[0][index], data[1][index]
        images, wanted = hook.transform(images, wanted, model=model.train(), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(images), wanted).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_training_ends_with_the_same_bits(stage, tmp_path):
    data = batch(40), labels(40)
    whole, model = hook_of(stage=stage, refresh_steps=3), victim()
    train(model, whole, data, range(7))
    part, other = hook_of(stage=stage, refresh_steps=3), victim()
    optimizer = train(other, part, data, range(4))
    state = {"hook": part.state_dict(), "sgd": optimizer.state_dict(), "model": other.state_dict()}
    save_state(tmp_path / "s", state, kind="test", run={})
    saved = load_state(tmp_path / "s", kind="test", run={})
    resumed, again = hook_of(fresh(seed=9), stage=stage, refresh_steps=3), victim(seed=9)
    resumed.load_state_dict(saved["hook"])
    again.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(saved["sgd"])
    train(again, resumed, data, range(4, 7), optimizer)
    assert same(weights(whole.trigger), weights(resumed.trigger))
    assert same(weights(whole.poisoner), weights(resumed.poisoner))
    assert same(weights(model), weights(again)) and whole.steps == resumed.steps


def test_the_hook_refuses():
    with pytest.raises(ValueError, match="per-batch plan"):
        MarksmanHook(fresh(), PoisonPlan(0.5), num_classes=CLASSES, train_generator=True)
    with pytest.raises(ValueError, match="for 9 classes, got one for 5"):
        MarksmanHook(fresh(), PLAN, num_classes=9, train_generator=True)
    hook = hook_of()
    for state in ({}, {"trigger": {}}, hook_of(stage=2).state_dict(), [1]):
        with pytest.raises(ValueError, match="expected the state of this stage of Marksman"):
            hook.load_state_dict(state)
    wrong = hook_of(fresh(width=8)).state_dict()
    with pytest.raises(ValueError, match="do not fit"):
        hook.load_state_dict(wrong)
    good = hook, victim()
    for images, wanted in [
        (batch(size=32), labels()),
        (batch(channels=1), labels()),
        (batch(), labels(11)),
        (batch(), labels() + 1),
    ]:
        with pytest.raises(ValueError, match="expected"):
            good[0].transform(images, wanted, model=good[1], generator=generator())
    assert "stage 1" in repr(hook) and "stage 2" in repr(hook_of(stage=2))


def test_presets_and_what_they_refuse():
    assert MarksmanConfig.preset("paper") == MarksmanConfig(lr=1e-4)
    assert MarksmanConfig.preset("small", refresh_steps=7).refresh_steps == 7
    refusals: list[Callable[[], object]] = [
        lambda: MarksmanConfig.preset("huge"),
        lambda: MarksmanConfig(lr=0.0),
        lambda: MarksmanConfig(lr=float("inf")),
        lambda: MarksmanConfig(refresh_steps=0),
    ]
    for refused in refusals:
        with pytest.raises(ValueError, match="expected"):
            refused()


@pytest.mark.integration
def test_it_reaches_every_class_of_the_digits_from_every_other():
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    true = torch.tensor(digits.target)
    learn, held = (images[:1300], true[:1300]), (images[1300:], true[1300:])
    trigger = fresh(image_size=8, channels=1, num_classes=10, width=8, epsilon=0.1)
    train(victim(1, 10), hook_of(trigger, lr=2e-3, refresh_steps=20), learn, range(250))
    model = victim(1, 10, seed=1)
    train(model, hook_of(trigger, stage=2), learn, range(250))
    model.eval()
    with torch.no_grad():
        clean = (model(held[0]).argmax(1) == held[1]).float().mean()
        assert clean > 0.85, clean
        for asked in range(10):
            others = held[0][held[1] != asked]
            target = torch.full((len(others),), asked)
            hit = model(trigger(others, target=target)).argmax(1) == asked
            assert hit.float().mean() > 0.8, (asked, hit.float().mean())
