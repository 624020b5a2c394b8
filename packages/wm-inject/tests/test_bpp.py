"""BppAttack against an implementation of its own, pixel by pixel in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wm_inject import BppTrigger, PoisonPlan, attack, psnr, quantize


def floyd_steinberg(image: np.ndarray, levels: int) -> np.ndarray:
    """One channel ``(H, W)`` in [0, 1], in the order in which it is read."""
    values = image.astype(np.float64)
    height, width = values.shape
    for row in range(height):
        for column in range(width):
            old = values[row, column]
            new = np.round(old * (levels - 1)) / (levels - 1)
            values[row, column] = new
            for down, right, weight in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if 0 <= column + right < width and row + down < height:
                    values[row + down, column + right] += (old - new) * weight / 16
    return values.clip(0, 1)


def images(side: int, channels: int, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return quantize(torch.rand(count, channels, side, side, generator=generator))


@pytest.mark.parametrize("levels", [2, 8, 32])
@pytest.mark.parametrize(("side", "channels"), [(1, 1), (2, 3), (5, 1), (28, 1), (32, 3)])
def test_dithering_is_that_of_the_reference(side: int, channels: int, levels: int) -> None:
    clean = images(side, channels)
    found = BppTrigger(image_size=side, levels=levels)(clean)
    expected = [[floyd_steinberg(plane, levels) for plane in image] for image in clean.numpy()]
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=0, atol=1e-6)


def test_a_known_image() -> None:
    """A grey of 0.4 on two levels, its first two rows worked out by hand."""
    found = BppTrigger(image_size=4, levels=2)(torch.full((1, 1, 4, 4), 0.4))[0, 0]
    assert found[:2].tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]
    plain = BppTrigger(image_size=4, levels=2, dithering=False)(torch.full((1, 1, 4, 4), 0.4))
    assert not plain.any()


def test_without_dithering_every_value_goes_to_the_nearest_level() -> None:
    clean = images(16, 3)
    found = BppTrigger(image_size=16, dithering=False)(clean)
    assert torch.allclose(found * 7, (clean * 7).round(), atol=1e-5)
    assert float((found - clean).abs().max()) <= 1 / 14 + 1e-6
    dithered = BppTrigger(image_size=16)(clean)
    assert torch.allclose(dithered * 7, (dithered * 7).round(), atol=1e-5)
    assert float(psnr(dithered, clean).mean()) < float(psnr(found, clean).mean())


def test_many_levels_change_nothing() -> None:
    clean = images(8, 3)
    assert torch.allclose(BppTrigger(image_size=8, levels=256)(clean), clean, atol=1e-6)


def test_batches_hold_attack_images_cross_triggers_and_clean_images() -> None:
    clean, labels = images(16, 3, count=50), torch.arange(50) % 10
    bpp = attack("bpp", dithering=False)
    plan = bpp.plan(labels, target=3)
    assert plan == PoisonPlan(0.1, target=3, mode="per_batch")
    trigger = BppTrigger(image_size=16, dithering=False)
    hook = bpp.hook(trigger, plan, num_classes=10)
    assert hook is not None
    mixed, new = hook.transform(
        clean, labels, model=torch.nn.Identity(), generator=torch.Generator().manual_seed(0)
    )
    squeezed = trigger(clean)
    attacked = (mixed == quantize(squeezed)).flatten(1).all(1)
    same = (mixed == clean).flatten(1).all(1)
    crossed = ~attacked & ~same
    assert (int(attacked.sum()), int(crossed.sum())) == (5, 5)
    assert new[attacked].unique().tolist() == [3] and torch.equal(new[~attacked], labels[~attacked])
    for row in crossed.nonzero().flatten().tolist():
        candidates = (clean[row] + squeezed - clean).clamp(0, 1)
        donor = (candidates - mixed[row]).abs().flatten(1).amax(1).argmin()
        assert int(donor) != row
        expected = quantize((clean[row] + squeezed[donor] - clean[donor])[None])[0]
        assert torch.equal(expected, mixed[row])


@pytest.mark.parametrize("levels", [1, 257, 8.0])
def test_levels_out_of_range_are_refused(levels: float) -> None:
    with pytest.raises(ValueError, match="levels"):
        BppTrigger(image_size=8, levels=levels)
