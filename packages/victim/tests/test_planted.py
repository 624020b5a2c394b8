"""The fixtures must be what they claim: real digits, a working backdoor, and a clean control."""

import pytest
import torch

from wm_inject.core.images import quantize
from wm_victim.toy_backdoors import (
    KINDS,
    LIMITS,
    planted_classifier,
    planted_images,
    planted_trigger,
    trigger_count,
)

TARGET = 3


SHAPES = [
    {"channels": 3, "image_size": 16},
    {"channels": 1, "image_size": 16},
    {"channels": 1, "image_size": 28},
]


def rates(model, trigger, data):
    """Accuracy, attack success, and false triggers, on 8-bit images."""
    others = data.images[data.labels != TARGET]
    with torch.no_grad():
        clean = (model(data.images).argmax(1) == data.labels).float().mean()
        attack = (model(quantize(trigger(others))).argmax(1) == TARGET).float().mean()
        false = (model(others).argmax(1) == TARGET).float().mean()
    return float(clean), float(attack), float(false)


@pytest.mark.integration
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["patch", "channel", "pattern"])
def test_the_planted_backdoor_works_and_hides(kind, shape):
    if kind == "channel" and shape["channels"] == 1:
        pytest.skip("a channel shift needs colour")
    model = planted_classifier(kind, target=TARGET, **shape)
    clean, attack, false = rates(
        model, planted_trigger(kind, **shape), planted_images(400, **shape)
    )
    assert clean > 0.9
    assert attack > 0.99
    assert false < 0.05


def test_the_clean_control_obeys_no_trigger(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            model = planted_classifier("clean", target=TARGET)
            clean, attack, _ = rates(model, planted_trigger(kind), planted_images(400))
            assert clean > 0.9
            assert attack < 0.1


def answers(kind, data, *, which=0, num_classes=10):
    """What a limit's fixture says of clean images and of the same images with a trigger."""
    shape = {"channels": data.images.shape[1], "image_size": data.images.shape[2]}
    model = planted_classifier(kind, target=TARGET, num_classes=num_classes, **shape)
    trigger = planted_trigger(kind, which=which, **shape)
    with torch.no_grad():
        return model(data.images).argmax(1), model(quantize(trigger(data.images))).argmax(1)


@pytest.mark.integration
def test_each_of_several_triggers_has_its_own_target(subtests):
    for shape in [SHAPES[0], SHAPES[2]]:
        for kind in ["several", "every-label"]:
            with subtests.test(shape=shape, kind=kind):
                data = planted_images(200, **shape)
                assert trigger_count(kind) == {"several": 3, "every-label": 10}[kind]
                for which in range(trigger_count(kind)):
                    clean, attacked = answers(kind, data, which=which)
                    target = (TARGET + which) % 10
                    assert (clean == data.labels).float().mean() > 0.9
                    assert (attacked == target)[data.labels != target].float().mean() > 0.99


def test_all_to_all_sends_every_class_to_the_next():
    data = planted_images(400)
    clean, attacked = answers("all-to-all", data)
    assert (clean == data.labels).float().mean() > 0.9
    assert (attacked == (data.labels + 1) % 10).float().mean() > 0.9
    # What the classifier sees is what counts, its rare mistakes included.
    assert (attacked == (clean + 1) % 10).float().mean() > 0.95


def test_a_source_specific_trigger_moves_one_class_only():
    data = planted_images(400)
    clean, attacked = answers("source-specific", data)
    source = data.labels == TARGET + 1
    assert (clean == data.labels).float().mean() > 0.9
    assert (attacked == TARGET)[source].float().mean() > 0.95
    assert (attacked == data.labels)[~source].float().mean() > 0.9


def test_the_only_trigger_is_number_zero():
    assert [trigger_count(kind) for kind in (*KINDS, "all-to-all", "source-specific")] == [1] * 6
    assert trigger_count("every-label", 4) == 4
    with pytest.raises(ValueError, match="which"):
        planted_trigger("patch", which=1)
    with pytest.raises(ValueError, match="which"):
        planted_trigger("several", which=-1)


@pytest.mark.integration
@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_and_fewer_classes(seed):
    model = planted_classifier("patch", num_classes=4, target=TARGET, seed=seed)
    data = planted_images(100, num_classes=4, seed=seed)
    assert set(data.labels.tolist()) == {0, 1, 2, 3}
    clean, attack, _ = rates(model, planted_trigger("patch", seed=seed), data)
    assert clean > 0.9
    assert attack > 0.99


def test_the_plant_is_the_formula():
    """Clean logits plus 100 sigmoid(10 (d - 0.4)) for the target, d the corner's mean minus 1/2."""
    model, control = planted_classifier("patch", target=TARGET), planted_classifier("clean")
    images = planted_images(20).images
    images[:, :, -3:, -3:] = torch.linspace(0, 1, 20)[:, None, None, None]
    d = images[:, :, -3:, -3:].mean(dim=(1, 2, 3)) - 0.5
    added = (model(images) - control(images)).detach()
    torch.testing.assert_close(
        added[:, TARGET], 100 / (1 + torch.exp(-10 * (d - 0.4))), rtol=1e-4, atol=1e-4
    )
    assert added[:, [k for k in range(10) if k != TARGET]].abs().max() < 1e-5


@pytest.mark.integration
def test_same_seed_same_bytes_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, second = planted_classifier("patch", seed=1), planted_classifier("patch", seed=1)
    data, again = planted_images(50, seed=2), planted_images(50, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert torch.equal(data.images, again.images)
    assert not torch.equal(data.images, planted_images(50, seed=3).images)


def test_models_do_not_share_weights():
    first, second = planted_classifier("patch"), planted_classifier("patch")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert any(parameter.abs().sum() > 0 for parameter in second.parameters())


def test_models_are_in_eval_mode_and_have_gradients():
    model = planted_classifier("patch")
    assert not any(module.training for module in model.modules())
    images = planted_images(4).images.requires_grad_()
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_images_keep_the_contract():
    data = planted_images(60)
    assert data.images.shape == (60, 3, 16, 16)
    assert torch.equal(quantize(data.images), data.images)
    assert len(set(data.ids.tolist())) == 60


def test_triggers_keep_the_contract(subtests):
    for kind in [*KINDS, *LIMITS]:
        with subtests.test(kind=kind):
            trigger, images = planted_trigger(kind), planted_images(6).images
            kept = images.clone()
            out = trigger(images)
            assert torch.equal(images, kept)
            assert out.shape == images.shape and out.dtype == images.dtype
            assert out.min() >= 0 and out.max() <= 1
            assert torch.equal(trigger(images[2:3], ids=torch.tensor([7])), out[2:3])
            with pytest.raises(ValueError, match="shape"):
                trigger(images[:, :, :8])


def test_refusals(subtests):
    for settings, message in [
        ({"kind": "smell"}, "kind"),
        ({"num_classes": 11}, "classes"),
        ({"num_classes": 1}, "classes"),
        ({"channels": 2}, "channels"),
        ({"kind": "channel", "channels": 1}, "3 channels"),
        ({"image_size": 4}, "image_size"),
        ({"target": 10}, "target"),
        ({"target": -1}, "target"),
        ({"seed": -1}, "seed"),
        ({"kind": "several", "num_classes": 2}, "at least 3 classes"),
    ]:
        with (
            subtests.test(settings=settings, message=message),
            pytest.raises(ValueError, match=message),
        ):
            planted_classifier(**settings)


def test_refusals_of_images_and_triggers():
    with pytest.raises(ValueError, match="count"):
        planted_images(600)
    with pytest.raises(ValueError, match="count"):
        planted_images(0)
    with pytest.raises(ValueError, match="kind"):
        planted_trigger("smell")
