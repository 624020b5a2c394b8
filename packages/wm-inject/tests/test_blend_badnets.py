"""BadNets and Blend beyond what test_triggers.py says: grey and large images, drawn pictures."""

from __future__ import annotations

import torch

from wm_inject import BadNetsTrigger, BlendTrigger, build_trigger
from wm_inject.attacks.pictures import PICTURES, cartoon

SIZES = [28, 32, 64, 160, 224]


def batch(n: int = 3, channels: int = 3, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_patch_changes_its_square_and_no_more(subtests):
    for size in SIZES:
        for channels in [1, 3]:
            with subtests.test(size=size, channels=channels):
                trigger, images = (
                    BadNetsTrigger(image_size=size),
                    batch(channels=channels, size=size) * 0.9,
                )
                out, side = trigger(images), round(3 * size / 32)
                changed = (out != images).flatten(1).sum(1)
                assert changed.tolist() == [side * side * channels] * 3
                assert torch.equal(out[..., :-side, :], images[..., :-side, :])
                assert torch.equal(out[..., :-side], images[..., :-side])


def test_what_was_under_the_patch_does_not_matter():
    trigger, images, others = BadNetsTrigger(image_size=32), batch(), batch(seed=2)
    mixed = torch.where(trigger.mask, others, images)
    assert not torch.equal(mixed, images)
    assert torch.equal(trigger(mixed), trigger(images))
    assert torch.equal(BadNetsTrigger(image_size=32)(images), trigger(images))


def test_noise_is_the_plain_draw_of_its_seed():
    for shape in ((1, 28, 28), (3, 32, 32)):
        trigger = BlendTrigger(image_size=shape[1], channels=shape[0], seed=7)
        wanted = torch.rand(shape, generator=torch.Generator().manual_seed(7))
        assert torch.equal(trigger.picture, wanted)
        assert trigger.config["picture"] == "noise"


def test_drawn_pictures_at_every_size(subtests):
    for name in list(PICTURES):
        for size in SIZES:
            for channels in [1, 3]:
                with subtests.test(name=name, size=size, channels=channels):
                    trigger = BlendTrigger(image_size=size, channels=channels, picture=name, seed=3)
                    wanted = PICTURES[name](size, channels=channels, seed=3)
                    assert torch.equal(trigger.picture, wanted)
                    images = batch(1, channels, size)
                    assert (trigger(images) - images).abs().max() <= 0.2


def test_a_cartoon_is_named_in_the_settings_and_follows_the_seed():
    trigger = BlendTrigger(image_size=32, channels=3, picture="cartoon", seed=5)
    assert trigger.config["picture"] == "cartoon"
    again = build_trigger("blend", trigger.config, state=trigger.state_dict())
    assert torch.equal(again(batch()), trigger(batch())) and again.config == trigger.config
    assert torch.equal(build_trigger("blend", trigger.config).picture, trigger.picture)
    assert torch.equal(trigger.picture, cartoon(32, channels=3, seed=5))
    other = BlendTrigger(image_size=32, channels=3, picture="cartoon", seed=6)
    assert not torch.equal(other.picture, trigger.picture)
