"""What every built-in trigger promises, and what each one promises by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wm_inject import (
    BadNetsTrigger,
    BlendTrigger,
    WaNetTrigger,
    build_trigger,
    load_trigger,
    save_trigger,
)
from wm_inject.attacks import TRIGGER_KINDS, list_attacks
from wm_inject.core.checkpoint import CheckpointError, save_checkpoint
from wm_inject.core.images import load_image, save_image, to_float

SIZE = 16


def batch(n: int = 5, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def triggers() -> list[torch.nn.Module]:
    return [
        BadNetsTrigger(image_size=SIZE, size=3, margin=1, value=0.5),
        BlendTrigger(image_size=SIZE, channels=3, alpha=0.3, seed=2),
        BlendTrigger(image_size=SIZE, channels=3, picture=batch()[0]),
        WaNetTrigger(image_size=SIZE, grid=3, strength=0.7, seed=3),
    ]


every = pytest.mark.parametrize("trigger", triggers(), ids=lambda t: f"{t.kind}")


@every
def test_shape_range_and_input_are_kept(trigger):
    images = batch()
    before = images.clone()
    out = trigger(images, ids=torch.arange(5), target=torch.zeros(5, dtype=torch.int64))
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(images, before) and not torch.equal(out, images)


@every
def test_the_batch_does_not_matter(trigger):
    images = batch()
    alone = torch.cat([trigger(image[None]) for image in images])
    assert torch.equal(trigger(images), alone)


@every
def test_extremes_stay_in_range(trigger):
    for value in (0.0, 1.0):
        out = trigger(torch.full((2, 3, SIZE, SIZE), value))
        assert out.min() >= 0 and out.max() <= 1


def test_bad_images_are_refused(subtests):
    for trigger in triggers():
        for bad in [
            torch.rand(3, SIZE, SIZE),
            torch.rand(1, 3, SIZE + 1, SIZE + 1),
            torch.rand(0, 3, SIZE, SIZE),
            torch.rand(1, 3, SIZE, SIZE).double(),
            torch.rand(1, 3, SIZE, SIZE) + 1,
        ]:
            with (
                subtests.test(trigger=trigger, bad=bad),
                pytest.raises(ValueError, match="expected"),
            ):
                trigger(bad)


@every
def test_settings_rebuild_it_and_files_bring_it_back(trigger, tmp_path):
    json.dumps(trigger.config)
    again = build_trigger(trigger.kind, trigger.config, state=trigger.state_dict())
    assert torch.equal(again(batch()), trigger(batch()))
    assert again.config == trigger.config
    save_trigger(trigger, tmp_path / "t.safetensors", {"seed": 9})
    loaded = load_trigger(tmp_path / "t.safetensors")
    assert torch.equal(loaded(batch()), trigger(batch()))
    assert not loaded.training and loaded.kind == trigger.kind


@every
def test_repr_names_the_settings(trigger):
    assert f"image_size={SIZE}" in repr(trigger)


def test_unknown_kinds_and_settings_are_refused():
    with pytest.raises(ValueError, match="expected a trigger in "):
        build_trigger("sticker", {})
    with pytest.raises(ValueError, match="expected the settings of a badnets"):
        build_trigger("badnets", {"image_size": SIZE, "colour": 1})
    with pytest.raises(ValueError, match="expected the settings of a badnets"):
        build_trigger("badnets", None)
    with pytest.raises(ValueError, match="expected picture"):
        build_trigger("blend", {"image_size": SIZE, "channels": 3, "picture": "given"}, state={})
    assert set(TRIGGER_KINDS) == {*list_attacks(), "watermark"}


def test_saving_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got Linear"):
        save_trigger(torch.nn.Linear(2, 2), tmp_path / "t.safetensors")


def test_files_that_hold_no_trigger_are_refused(tmp_path, subtests):
    for kind, config, state in [
        ("classifier", {}, {}),
        ("badnets", {"image_size": SIZE}, {"mask": torch.zeros(2)}),
        ("badnets", {"image_size": 10**9}, {"mask": torch.zeros(2)}),
        ("wanet", {"image_size": SIZE, "grid": "four"}, {}),
        ("blend", {"image_size": SIZE, "channels": 3, "picture": "given"}, {}),
    ]:
        with subtests.test(kind=kind, config=config, state=state):
            path = tmp_path / "t.safetensors"
            save_checkpoint(path, kind=kind, config=config, state=state or {"x": torch.zeros(1)})
            with pytest.raises(CheckpointError) as caught:
                load_trigger(path)
            assert "\n" not in str(caught.value)


def test_patch_overwrites_nine_pixels_in_the_corner():
    images, trigger = torch.rand(2, 3, 32, 32) * 0.9, BadNetsTrigger(image_size=32)
    changed = trigger(images) != images
    assert changed.sum(dim=(1, 2, 3)).tolist() == [27, 27]
    assert bool(changed[:, :, 29:, 29:].all())
    assert torch.equal(trigger(trigger(images)), trigger(images))
    assert bool((trigger(images)[:, :, 29:, 29:] == 1).all())


def test_patch_grows_with_the_image(subtests):
    for image_size, side in [(8, 1), (28, 3), (32, 3), (64, 6), (224, 21)]:
        with subtests.test(image_size=image_size, side=side):
            assert int(BadNetsTrigger(image_size=image_size).mask.sum()) == side**2


def test_patch_margin_and_neural_cleanse_square():
    mask = BadNetsTrigger(image_size=32, size=4, margin=1).mask[0]
    assert mask.nonzero().amin(0).tolist() == [27, 27]
    assert mask.nonzero().amax(0).tolist() == [30, 30]


def test_patch_refuses(subtests):
    for bad in [
        {"size": 0},
        {"size": 17},
        {"size": 3, "margin": 14},
        {"margin": -1},
        {"value": 1.1},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            BadNetsTrigger(image_size=SIZE, **bad)


def test_blend_is_affine_and_bounded():
    trigger = BlendTrigger(image_size=SIZE, channels=3, alpha=0.2)
    a, b = batch()[:1], batch()[1:2]
    assert torch.allclose(trigger(a) - trigger(b), 0.8 * (a - b), atol=1e-6)
    assert torch.allclose(trigger(trigger.picture[None])[0], trigger.picture, atol=1e-6)
    assert (trigger(a) - a).abs().max() <= 0.2
    assert torch.equal(BlendTrigger(image_size=SIZE, channels=3, alpha=0.0)(a), a)


def test_blend_never_needs_to_clip(subtests):
    for alpha in [0.0, 0.2, 1.0]:
        for picture in ["noise", "cartoon", "logo"]:
            with subtests.test(alpha=alpha, picture=picture):
                trigger = BlendTrigger(image_size=SIZE, channels=3, alpha=alpha, picture=picture)
                for value in (0.0, 1.0):
                    exact = (1 - alpha) * value + alpha * trigger.picture.double()
                    assert exact.min() >= 0 and exact.max() <= 1
                    out = trigger(torch.full((1, 3, SIZE, SIZE), value))[0]
                    torch.testing.assert_close(out, exact.float(), rtol=0, atol=1e-6)


def test_blend_noise_follows_the_seed():
    pictures = [BlendTrigger(image_size=8, channels=1, seed=s).picture for s in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_blend_takes_a_picture_file_that_may_then_go(tmp_path):
    path = tmp_path / "p.png"
    save_image(path, np.random.default_rng(0).integers(0, 256, (9, 21, 3), dtype=np.uint8))
    trigger = BlendTrigger(image_size=SIZE, channels=3, picture=path)
    wanted = to_float(load_image(path, size=SIZE)[None])[0]
    assert torch.equal(trigger.picture, wanted)
    assert trigger.config["picture"] == "given"
    save_trigger(trigger, tmp_path / "t.safetensors")
    path.unlink()
    assert torch.equal(load_trigger(tmp_path / "t.safetensors").picture, wanted)


def test_blend_refuses(subtests):
    for bad in [
        {"alpha": 1.1},
        {"channels": 2},
        {"picture": "none.png"},
        {"picture": torch.rand(1, SIZE, SIZE)},
        {"picture": torch.rand(3, SIZE, SIZE) + 1},
        {"picture": 7},
        {"image_size": 0},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            BlendTrigger(**{"image_size": SIZE, "channels": 3, **bad})
