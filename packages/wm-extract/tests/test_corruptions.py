from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from wm_extract.corruptions import (
    EXTRA_CORRUPTIONS,
    PAPER_CORRUPTIONS,
    Blur,
    CropResize,
    GaussianNoise,
    Grey,
    Identity,
    Jpeg,
    RandomCorruption,
    RandomMask,
    Rescale,
    Rotation,
    SaltPepper,
    named_corruption,
)
from wm_inject import quantize, to_pixels

ALL = {**PAPER_CORRUPTIONS, **EXTRA_CORRUPTIONS}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 4, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(n, channels, side, side, generator=generator(9))


def test_keeps_shape_and_range_is_seeded_and_leaves_the_input(subtests: pytest.Subtests) -> None:
    for name in ALL:
        for channels, side in [(1, 28), (3, 32)]:
            with subtests.test(name=name, channels=channels, side=side):
                x = images(3, channels, side)
                before = x.clone()
                out = ALL[name](x, generator=generator(1))
                assert out.shape == x.shape and out.dtype == torch.float32
                assert out.min() >= 0 and out.max() <= 1
                assert torch.equal(out, ALL[name](x, generator=generator(1)))
                assert torch.equal(x, before)


def test_gradient_flows(subtests: pytest.Subtests) -> None:
    for name in ALL:
        with subtests.test(name=name):
            x = images(2).mul(0.5).add(0.25).requires_grad_()
            ALL[name](x, generator=generator(1)).sum().backward()
            assert x.grad is not None and x.grad.abs().sum() > 0


def test_another_seed_gives_another_image(subtests: pytest.Subtests) -> None:
    for name in ["mask", "rotation", "noise", "salt-pepper", "rescale", "crop"]:
        with subtests.test(name=name):
            x = images()
            assert not torch.equal(
                ALL[name](x, generator=generator(1)), ALL[name](x, generator=generator(2))
            )


@pytest.mark.parametrize("mode", ["pixel", "block"])
def test_mask_erases_a_quarter_to_black(mode: str) -> None:
    x = torch.ones(300, 3, 32, 32)
    out = RandomMask(mode)(x, generator=generator())  # type: ignore[arg-type]
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(out[:, 0], out[:, 1]), "channels are erased together"
    if mode == "block":
        assert ((out[:, 0] == 0).sum((1, 2)) == 16 * 16).all()


def test_no_corruption_at_zero_strength() -> None:
    x = images()
    for nothing in (
        Identity(),
        RandomMask(share=0.0),
        GaussianNoise(0.0),
        SaltPepper(0.0),
        RandomCorruption([SaltPepper()], probability=0.0),
    ):
        assert torch.equal(nothing(x, generator=generator()), x)
    for nothing in (Rotation(0.0), Rescale(1.0, 1.0), CropResize(1.0)):
        assert torch.allclose(nothing(x, generator=generator()), x, atol=1e-5)


def test_rotation_agrees_with_scipy_inside_and_empties_the_corners() -> None:
    x = images(1, 1)
    out = Rotation(60.0)(x, generator=generator(3))
    draw = torch.rand(1, generator=generator(3)).item()
    angle = draw * 120 - 60
    expected = ndimage.rotate(x[0, 0].numpy(), angle, reshape=False, order=1)
    difference = np.abs(out[0, 0].numpy() - expected)[10:22, 10:22]
    assert difference.max() < 1e-3
    assert Rotation(45.0)(torch.ones(8, 1, 32, 32), generator=generator())[:, :, 0, 0].min() == 0


def test_noise_has_the_stated_deviation() -> None:
    x = torch.full((50, 1, 32, 32), 0.5)
    noise = GaussianNoise(0.05)(x, generator=generator()) - x
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=1e-3)


def test_salt_and_pepper_share() -> None:
    out = SaltPepper(0.1)(torch.full((100, 1, 32, 32), 0.5), generator=generator())
    assert (out == 1).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert (out == 0).float().mean().item() == pytest.approx(0.05, abs=0.003)


def test_rescale_agrees_with_pillow_when_enlarging() -> None:
    x = images(1, 1, 16)
    corruption = Rescale(2.0, 2.0)
    small = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear")
    picture = Image.fromarray((x[0, 0].numpy() * 255).astype(np.float32))
    by_pillow = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)) / 255
    assert np.abs(by_pillow - small[0, 0].numpy()).max() < 1e-4
    assert (corruption(x, generator=generator()) - x).abs().mean() < 0.15


def test_jpeg_is_pillows_and_passes_gradients_straight_through() -> None:
    x = images(1)
    decoded = Jpeg(75)(x, generator=generator())
    assert 0 < (decoded - x).abs().mean() < 0.2
    leaf = x.clone().requires_grad_()
    Jpeg(75)(leaf, generator=generator()).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones_like(leaf))
    assert torch.allclose(Jpeg(75)(leaf, generator=generator()), decoded, atol=1e-6)


def test_blur_agrees_with_scipy() -> None:
    x = images(1, 1)
    ours = Blur(1.0)(x, generator=generator())[0, 0].numpy()
    theirs = ndimage.gaussian_filter(x[0, 0].numpy(), 1.0, truncate=3.0)
    assert np.abs(ours - theirs)[6:-6, 6:-6].max() < 1e-4


def test_a_crop_is_the_window_that_was_drawn() -> None:
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)
    out = CropResize(0.85, most=1.0)(ramp, generator=generator())
    # Over a ramp, what is left of its slope is the share of the width that is left.
    shares = (out[:, 0, 32, 40] - out[:, 0, 32, 24]) / (ramp[0, 0, 0, 40] - ramp[0, 0, 0, 24])
    assert 0.849 < shares.min() < 0.87 and 0.98 < shares.max() < 1.001
    fixed = CropResize(0.8)(ramp, generator=generator())
    slopes = (fixed[:, 0, 32, 40] - fixed[:, 0, 32, 24]) / (ramp[0, 0, 0, 40] - ramp[0, 0, 0, 24])
    assert torch.allclose(slopes, torch.tensor(0.8), atol=1e-4)
    assert fixed[:, 0, 32, 32].std() > 0.02, "the window moves"


def test_grey_is_pillows_luminance() -> None:
    x = quantize(images())
    ours = Grey()(x, generator=generator())
    assert torch.equal(ours[:, 0], ours[:, 1]) and torch.equal(ours[:, 0], ours[:, 2])
    for image, grey in zip(to_pixels(x), ours, strict=True):
        theirs = np.asarray(Image.fromarray(image).convert("L"), np.float32)
        assert np.abs(grey[0].numpy() * 255 - theirs).max() <= 1
    alone = images(channels=1)
    assert torch.equal(Grey()(alone, generator=generator()), alone)


def test_random_corruption_touches_the_stated_share() -> None:
    x = torch.full((2000, 1, 8, 8), 0.5)
    out = RandomCorruption([SaltPepper(1.0)], probability=0.3)(x, generator=generator())
    touched = (out != x).flatten(1).any(1).float().mean().item()
    assert touched == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 2000))


def test_settings_out_of_range_are_refused(subtests: pytest.Subtests) -> None:
    for build in [
        lambda: RandomMask("stripes"),  # type: ignore[arg-type]
        lambda: RandomMask(share=1.0),
        lambda: Rotation(181),
        lambda: GaussianNoise(-0.1),
        lambda: SaltPepper(1.5),
        lambda: Rescale(0.0, 1.0),
        lambda: Rescale(2.0, 1.0),
        lambda: Jpeg(0),
        lambda: Blur(0.0),
        lambda: CropResize(0.0),
        lambda: CropResize(0.9, most=0.8),
        lambda: RandomCorruption([], probability=2.0),
        lambda: named_corruption("earthquake"),
    ]:
        with subtests.test(build=build), pytest.raises(ValueError, match="expected"):
            build()  # type: ignore[operator]


def test_bad_images_are_refused(subtests: pytest.Subtests) -> None:
    for corruption in [*ALL.values(), RandomCorruption([Identity()])]:
        for bad in [
            torch.rand(3, 32, 32),
            torch.rand(0, 3, 32, 32),
            torch.rand(2, 3, 32, 32) * 255,
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        ]:
            with (
                subtests.test(corruption=corruption, bad=bad),
                pytest.raises(ValueError, match="expected"),
            ):
                corruption(bad, generator=generator())
