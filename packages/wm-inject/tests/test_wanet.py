from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from wm_inject import WaNetTrigger, quantize
from wm_inject.core.plan import PoisonPlan

PLAN = PoisonPlan(0.1, target=3, mode="per_batch")
MODEL = torch.nn.Identity()


def smooth_images(n: int, size: int = 32) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(torch.rand(n, 3, size + 4, size + 4), 5, stride=1)


def test_no_strength_is_the_identity():
    images = torch.rand(3, 3, 32, 32)
    out = WaNetTrigger(image_size=32, strength=0.0)(images)
    assert (out - images).abs().max() < 1e-3 / 255 * 10


def test_constant_images_do_not_change():
    images = torch.full((1, 3, 32, 32), 0.6)
    assert torch.allclose(WaNetTrigger(image_size=32, strength=2.0)(images), images, atol=1e-6)


def test_the_field_is_normalised_smooth_and_keeps_its_corners():
    for seed in range(3):
        trigger = WaNetTrigger(image_size=32, grid=4, seed=seed)
        control = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        control /= control.abs().mean()
        corners = trigger.field[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        wanted = control[0][:, [0, 0, -1, -1], [0, -1, 0, -1]].T
        assert torch.allclose(corners, wanted, atol=1e-5)
        steps = trigger.field.diff(dim=1).abs().max(), trigger.field.diff(dim=2).abs().max()
        # Two neighbouring control points lie at most 2 / mean|P| apart, over 31 / 3 pixels.
        assert max(steps) < 1.0
        assert trigger.sampling.shape == (1, 32, 32, 2)
        assert trigger.sampling.abs().max() <= 1


def test_pixels_move_by_half_a_pixel_at_most():
    trigger = WaNetTrigger(image_size=32)
    moved = (trigger.sampling - trigger.identity)[0] * 31 / 2
    assert 0.1 < float(moved.norm(dim=-1).mean()) < 0.4
    assert float(moved.abs().max()) < 0.65


def test_it_reads_x_along_the_row_as_scipy_does():
    images = smooth_images(2)
    trigger = WaNetTrigger(image_size=32, strength=2.0, seed=5)
    x, y = ((trigger.sampling[0].double().numpy() + 1) / 2 * 31).transpose(2, 0, 1)
    wanted = np.stack(
        [[map_coordinates(c, [y, x], order=1) for c in image] for image in images.double().numpy()]
    )
    assert np.abs(trigger(images).numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("bad", [{"grid": 1}, {"grid": 33}, {"strength": -1.0}, {"image_size": 1}])
def test_warp_refuses(bad):
    with pytest.raises(ValueError, match="expected"):
        WaNetTrigger(**{"image_size": 32, **bad})


def transform(images, labels, *, seed=0, plan=PLAN, **settings):
    hook = WaNetTrigger(image_size=32).noise_hook(plan, num_classes=10, **settings)
    return hook.transform(
        images, labels, model=MODEL, generator=torch.Generator().manual_seed(seed)
    )


def test_a_batch_of_128_has_12_attack_24_noise_and_92_clean_images():
    images, labels = smooth_images(128), torch.arange(128) % 3 + 4  # no label is the target
    trigger = WaNetTrigger(image_size=32)
    out, new_labels = transform(images, labels)
    attacked = new_labels != labels
    same = (out == images).flatten(1).all(1)
    assert int(attacked.sum()) == 12 and int(same.sum()) == 92
    assert new_labels[attacked].unique().tolist() == [3]
    assert torch.equal(out[attacked], quantize(trigger(images[attacked])))
    assert torch.equal(out[~same], quantize(out[~same]))
    noisy = ~attacked & ~same
    assert int(noisy.sum()) == 24
    fixed = quantize(trigger(images[noisy]))
    assert not bool((out[noisy] == fixed).flatten(1).all(1).any())
    assert (out[noisy] - fixed).abs().mean() < 0.05


def test_the_hook_changes_nothing_it_is_given_and_follows_its_generator():
    images, labels = smooth_images(40), torch.arange(40) % 10
    before = images.clone(), labels.clone()
    first, again, other = (transform(images, labels, seed=s) for s in (0, 0, 1))
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].min() >= 0 and first[0].max() <= 1


def test_each_noise_image_has_noise_of_its_own():
    images, labels = smooth_images(1).expand(40, -1, -1, -1), torch.full((40,), 5)
    out, new_labels = transform(images, labels)
    changed = (out != images).flatten(1).any(1) & (new_labels == labels)
    assert len(out[changed].unique(dim=0)) == int(changed.sum()) == 8


def test_a_last_batch_that_is_too_small_stays_clean():
    images, labels = smooth_images(5), torch.arange(5)
    out, new_labels = transform(images, labels)
    assert torch.equal(out, images) and torch.equal(new_labels, labels)


def test_cross_ratio_zero_and_all_to_all():
    images, labels = smooth_images(40), torch.arange(40) % 10
    plan = PoisonPlan(0.1, mode="per_batch", label_map="all-to-all")
    out, new_labels = transform(images, labels, plan=plan, cross_ratio=0.0)
    changed = new_labels != labels
    assert int(changed.sum()) == 4
    assert torch.equal(new_labels[changed], (labels[changed] + 1) % 10)
    assert torch.equal(out[~changed], images[~changed])


def test_the_hook_has_no_state():
    hook = WaNetTrigger(image_size=32).noise_hook(PLAN, num_classes=10)
    assert hook.state_dict() == {}
    hook.load_state_dict({})
    with pytest.raises(ValueError, match="empty state, got mask"):
        hook.load_state_dict({"mask": 1})


def test_the_hook_refuses():
    trigger = WaNetTrigger(image_size=32)
    with pytest.raises(ValueError, match="per-batch plan"):
        trigger.noise_hook(PoisonPlan(0.1), num_classes=10)
    for ratio in (-1.0, 9.5):
        with pytest.raises(ValueError, match="cross_ratio"):
            trigger.noise_hook(PLAN, num_classes=10, cross_ratio=ratio)
    with pytest.raises(ValueError, match="labels in 0"):
        transform(smooth_images(20), torch.full((20,), 10))
    with pytest.raises(ValueError, match="shape"):
        transform(smooth_images(20, size=16), torch.zeros(20, dtype=torch.int64))
