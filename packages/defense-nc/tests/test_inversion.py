"""Trigger inversion on classifiers whose backdoor is known."""

import copy

import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, NCConfig, invert_trigger
from wm_victim.inference import frozen
from wm_victim.toy_backdoors import planted_classifier, planted_images

TARGET = 3
FAST = NCConfig.preset("fast")
TINY = NCConfig.preset("fast", steps=3, batches=2, batch_size=16)


@pytest.fixture(scope="module")
def data():
    return planted_images(200)


@pytest.fixture(scope="module")
def found(data):
    model = planted_classifier("patch", target=TARGET)
    return invert_trigger(model, data.images, TARGET, config=FAST, labels=data.labels)


@pytest.mark.integration
def test_it_finds_the_planted_patch(found):
    corner = torch.zeros(16, 16, dtype=torch.bool)
    corner[-3:, -3:] = True
    # The patch is brighter than the gate needs, so a part of it is enough: judged by where it is.
    mask = found.mask[0] > 0.1
    assert (mask & corner).sum() / (mask | corner).sum() > 0.5
    assert found.mask[0][corner].sum() / found.mask.sum() > 0.9
    assert found.pattern[:, -3:, -3:][:, found.mask[0, -3:, -3:] > 0.5].mean() > 0.8
    assert found.success_rate >= FAST.floor
    assert found.l1_norm <= 9
    assert found.steps < FAST.steps * len(FAST.starts)


@pytest.mark.integration
def test_its_success_rate_is_that_of_the_returned_trigger(found, data):
    model = planted_classifier("patch", target=TARGET)
    others = data.images[data.labels != TARGET]
    with torch.no_grad():
        rate = (model(found(others)).argmax(1) == TARGET).double().mean()
    assert found.success_rate == pytest.approx(float(rate), abs=1e-12)


@pytest.mark.integration
def test_it_is_a_trigger(found, data):
    images = data.images[:6]
    kept = images.clone()
    out = found(images)
    assert torch.equal(images, kept)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(
        out, (1 - found.mask) * images + found.mask * found.pattern, rtol=0, atol=1e-6
    )
    alone = found(images[2:3], ids=torch.tensor([5]), target=torch.tensor([1]))
    assert torch.equal(alone, out[2:3])
    other = InvertedTrigger(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16))
    other.load_state_dict(found.state_dict())
    assert torch.equal(other(images), out)
    assert found.kind == "nc"
    assert found.config["target"] == TARGET


def test_same_seed_same_bytes_whatever_the_global_generator(data):
    model = planted_classifier("patch")
    first = invert_trigger(model, data.images, 1, config=TINY, seed=4)
    torch.rand(5)
    second = invert_trigger(model, data.images, 1, config=TINY, seed=4)
    third = invert_trigger(model, data.images, 1, config=TINY, seed=5)
    assert torch.equal(first.mask, second.mask) and torch.equal(first.pattern, second.pattern)
    assert not torch.equal(first.mask, third.mask)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_as_it_was(data, training):
    model = planted_classifier("patch").train(training)
    model.body[1].eval()
    model.gain.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    invert_trigger(model, data.images, 1, config=TINY)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_comes_back_as_it_was_after_an_error():
    model = planted_classifier("patch").train()
    with pytest.raises(RuntimeError), frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


class Spy(nn.Module):
    """Remembers how bright the images were that it saw under gradients; knows two labels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().mean(dim=(1, 2, 3)))
        # Dark images are of label 0, bright ones of label 1.
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([1 - level, level], dim=1)


def test_images_of_the_target_are_left_out_by_label_or_by_the_models_own_answer():
    images = torch.cat([torch.full((4, 1, 8, 8), 0.1), torch.full((4, 1, 8, 8), 0.9)])
    labels = torch.tensor([0] * 4 + [1] * 4)
    config = NCConfig(steps=1, batches=1, batch_size=4, starts=("ones",), floor=0.5)
    results = []
    for known in (labels, None):
        spy = Spy()
        results.append(invert_trigger(spy, images, 0, config=config, labels=known))
        last = spy.seen[-1]
        assert len(last) == 4
        # What is left are bright images under one and the same mask.
        assert last.max() - last.min() < 1e-6
    assert torch.equal(results[0].mask, results[1].mask)


def test_the_mask_and_pattern_start_where_the_recipes_say(data):
    """Adam's first steps are no longer than its learning rate, so the start can still be seen."""
    model = planted_classifier("clean")
    settings = {"steps": 1, "batches": 1, "lr": 1e-6}
    ones = invert_trigger(model, data.images, 1, config=NCConfig(starts=("ones",), **settings))
    expected = torch.tanh(torch.tensor(1.0)) / 2 + 0.5
    torch.testing.assert_close(ones.mask, expected.expand(1, 16, 16), atol=1e-4, rtol=0)
    random = NCConfig(starts=("random",), **settings)
    drawn = invert_trigger(model, data.images, 1, config=random)
    assert drawn.mask.mean() == pytest.approx(0.5, abs=0.06)
    assert drawn.mask.std() == pytest.approx(12**-0.5, abs=0.03)


def test_the_cost_keeps_the_mask_small(data):
    """From the same start, a charged mask is smaller than a free one."""
    model = planted_classifier("clean")
    settings = {"steps": 4, "batches": 3, "starts": ("ones",)}
    free = invert_trigger(model, data.images, 1, config=NCConfig(**settings))
    charged = NCConfig(schedule="ports", init_cost=1.0, **settings)
    assert invert_trigger(model, data.images, 1, config=charged).l1_norm < free.l1_norm


def test_every_preset_runs(data, subtests):
    for preset in ["paper", "ports", "robust"]:
        with subtests.test(preset=preset):
            config = NCConfig.preset(preset, steps=2, batches=1)
            found = invert_trigger(planted_classifier("patch"), data.images, 0, config=config)
            assert found.mask.shape == (1, 16, 16)
            assert found.mask.min() >= 0 and found.mask.max() <= 1


def test_refusals(data):
    model, images = planted_classifier("patch"), data.images
    cases = [
        ((model, images[0], 0), {}, "shape"),
        ((model, images.double(), 0), {}, "float32"),
        ((model, images * 2, 0), {}, r"\[0, 1\]"),
        ((model, images[:0], 0), {}, "empty"),
        ((model, images, 10), {}, "target"),
        ((model, images, -1), {}, "target"),
        ((model, images, 1.5), {}, "target"),
        ((model, images, 0), {"labels": data.labels[:5]}, "labels"),
        ((model, images, 0), {"labels": data.labels.float()}, "int64"),
        ((model, images, 0), {"labels": data.labels + 5}, "labels in 0"),
        ((model, images, 0), {"labels": torch.zeros_like(data.labels)}, "other classes"),
        ((nn.Flatten(0), images, 0), {}, "logits"),
        ((lambda x: x, images, 0), {}, "torch module"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            invert_trigger(*arguments, config=TINY, **settings)


def test_a_model_that_answers_nan_is_refused(data):
    model = planted_classifier("patch")
    with torch.no_grad():
        model.gain.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite logits"):
        invert_trigger(model, data.images, 0, config=TINY)


@pytest.mark.integration
def test_refused_triggers(found):
    mask, pattern = torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)
    for arguments in [
        (mask[0], pattern),
        (mask, pattern[None]),
        (torch.zeros(3, 4, 4), pattern),
        (torch.zeros(1, 5, 4), pattern),
        (mask + 2, pattern),
        (mask.double(), pattern),
        (mask, pattern - 1),
        ([0.0], pattern),
    ]:
        with pytest.raises(ValueError, match="expected"):
            InvertedTrigger(*arguments)
    with pytest.raises(ValueError, match="success_rate"):
        InvertedTrigger(mask, pattern, success_rate=2.0)
    with pytest.raises(ValueError, match="shape"):
        found(torch.zeros(1, 3, 8, 8))


@pytest.mark.integration
def test_of_several_searches_the_smallest_trigger_counts() -> None:
    model, data = planted_classifier("patch"), planted_images(64, seed=1)
    settings = {"steps": 12, "batches": 4, "patience": 2, "floor": 0.5}

    def norm(*starts: str, seed: int) -> float:
        config = NCConfig(starts=starts, **settings)
        return float(invert_trigger(model, data.images, 0, config=config, seed=seed).l1_norm)

    single = norm("ones", seed=0), norm("random", seed=1)
    assert norm("ones", "random", seed=0) == min(single)
