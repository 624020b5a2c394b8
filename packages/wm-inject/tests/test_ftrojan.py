from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from wm_inject import FTrojanTrigger, load_trigger, save_trigger
from wm_inject.core.images import quantize, to_float, to_pixels

MAGNITUDE = 30 / 255


def grey(size: int = 32, n: int = 3, channels: int = 3) -> torch.Tensor:
    """Images that the trigger does not clip."""
    noise = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    return 0.3 + 0.4 * noise


def ycrcb(difference: torch.Tensor) -> np.ndarray:
    """A difference of RGB images ``(3, H, W)`` as one of Y, Cr and Cb."""
    red, green, blue = difference.double().numpy()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 0.713 * (red - luma), 0.564 * (blue - luma)])


def blocks(plane: np.ndarray, block: int = 32) -> list[np.ndarray]:
    """The whole blocks of a plane, row by row."""
    steps = range(0, len(plane) - block + 1, block)
    return [plane[y : y + block, x : x + block] for y in steps for x in steps]


def added(trigger: FTrojanTrigger, **kinds: int) -> torch.Tensor:
    images = grey(trigger.config["image_size"], **kinds)
    return trigger(images) - images


def test_the_difference_does_not_depend_on_the_image(subtests):
    for size in [28, 32, 64, 160, 224]:
        for channels in [1, 3]:
            with subtests.test(size=size, channels=channels):
                trigger = FTrojanTrigger(image_size=size, channels=channels)
                difference = added(trigger, channels=channels)
                wanted = trigger.pattern.expand_as(difference)
                torch.testing.assert_close(difference, wanted, rtol=0, atol=1e-6)
                assert trigger.pattern.abs().max() > 0.005


def test_only_two_coefficients_of_cr_and_cb_change(subtests):
    for size in [32, 64, 160, 224]:
        with subtests.test(size=size):
            luma, cr, cb = ycrcb(added(FTrojanTrigger(image_size=size))[0])
            wanted = np.zeros((32, 32))
            wanted[15, 15] = wanted[31, 31] = MAGNITUDE
            for plane in (cr, cb):
                for block in blocks(plane):
                    # The constants of the conversion and of its inverse agree to three digits.
                    np.testing.assert_allclose(dctn(block, norm="ortho"), wanted, atol=1e-4)
            for block in blocks(luma):
                np.testing.assert_allclose(dctn(block, norm="ortho"), 0, atol=1e-4)


@pytest.mark.parametrize("magnitude", [20, 30, 50])
def test_each_block_has_the_energy_of_two_coefficients(magnitude):
    trigger = FTrojanTrigger(image_size=64, magnitude=magnitude / 255)
    wanted = magnitude / 255 * math.sqrt(2)
    for block in blocks(trigger.chroma.double().numpy()):
        assert np.linalg.norm(block) == pytest.approx(wanted, rel=1e-6)
    _, cr, cb = ycrcb(added(trigger)[0])
    for block in blocks(cr) + blocks(cb):
        assert np.linalg.norm(block) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("magnitude", "peak"), [(20, 2.13), (30, 3.19), (50, 5.32)])
def test_its_peak_is_the_known_one(magnitude, peak):
    chroma = 255 * FTrojanTrigger(image_size=32, magnitude=magnitude / 255).chroma
    assert float(chroma.abs().max()) == pytest.approx(peak, abs=0.01)


def test_64_pixels_give_four_equal_blocks():
    small, large = (FTrojanTrigger(image_size=size).chroma for size in (32, 64))
    for corner in blocks(large.numpy()):
        assert np.array_equal(corner, small.numpy())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_brightness_stays_within_one_level(eight_bit):
    images = quantize(grey())
    out = quantize(FTrojanTrigger(image_size=32, eight_bit=eight_bit)(images))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    before, after = ((255 * batch * weights).sum(1).round() for batch in (images, out))
    assert (after - before).abs().max() <= 1 and not torch.equal(out, images)


@pytest.mark.parametrize(("size", "block", "whole"), [(40, 32, 32), (100, 32, 96), (28, 8, 24)])
def test_only_whole_blocks_carry_the_pattern(size, block, whole):
    pattern = FTrojanTrigger(image_size=size, block=block).pattern
    assert bool((pattern[:, whole:] == 0).all()) and bool((pattern[:, :, whole:] == 0).all())
    once = FTrojanTrigger(image_size=block, block=block).pattern
    count = whole // block
    assert torch.equal(pattern[:, :whole, :whole], once.repeat(1, count, count))


def test_the_positions_scale_with_the_block(subtests):
    for size, block, places in [
        (28, 28, [13, 27]),
        (32, 32, [15, 31]),
        (64, 32, [15, 31]),
        (224, 32, [15, 31]),
    ]:
        with subtests.test(size=size, block=block, places=places):
            config = FTrojanTrigger(image_size=size).config
            assert config["block"] == block and config["positions"] == [[p, p] for p in places]


def test_one_grey_plane_carries_the_pattern_itself():
    found = added(FTrojanTrigger(image_size=28, channels=1), channels=1)[0, 0]
    coefficients = dctn(found.double().numpy(), norm="ortho")
    wanted = np.zeros((28, 28))
    wanted[13, 13] = wanted[27, 27] = MAGNITUDE
    np.testing.assert_allclose(coefficients, wanted, atol=1e-5)


def test_positions_of_choice():
    trigger = FTrojanTrigger(image_size=32, positions=[(3, 7)], magnitude=50 / 255)
    coefficients = dctn(trigger.chroma.double().numpy(), norm="ortho")
    wanted = np.zeros((32, 32))
    wanted[3, 7] = 50 / 255
    np.testing.assert_allclose(coefficients, wanted, atol=1e-6)


def test_no_magnitude_is_the_identity():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(FTrojanTrigger(image_size=32, magnitude=0)(images), images)


def by_numpy(pixels: np.ndarray, magnitude: float, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The released recipe by way of the transform, on whole levels ``(H, W, 3)``.

    Returns the levels, and where a value on the way lies half way between two of them.
    """
    ties = np.zeros(pixels.shape[:2], dtype=bool)

    def rounded(values: np.ndarray) -> np.ndarray:
        nonlocal ties
        ties = ties | (np.abs(values - np.floor(values) - 0.5) < 1e-4)
        return np.rint(values)

    red, green, blue = pixels.astype(np.float64).transpose(2, 0, 1)
    luma = rounded(0.299 * red + 0.587 * green + 0.114 * blue)
    planes = []
    for colour, share in ((red, 0.713), (blue, 0.564)):
        plane = np.clip(rounded((colour - luma) * share) + 128, 0, 255)
        for part in blocks(plane, block):
            coefficients = dctn(part, norm="ortho")
            middle, end = round(15 / 31 * (block - 1)), block - 1
            coefficients[middle, middle] += magnitude
            coefficients[end, end] += magnitude
            part[:] = idctn(coefficients, norm="ortho")
        # Outside the blocks, and nowhere else, the plane still holds whole levels.
        planes.append(np.clip(np.floor(plane), 0, 255) - 128)
    cr, cb = planes
    channels = (luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb)
    out = np.stack([rounded(channel) for channel in channels], axis=2)
    return np.clip(out, 0, 255).astype(np.uint8), ties


def test_the_8_bit_path_is_that_of_numpy(subtests):
    for size, block in [(32, 32), (64, 32), (28, 28), (40, 32)]:
        for magnitude in [20, 50]:
            with subtests.test(size=size, block=block, magnitude=magnitude):
                pixels = np.random.default_rng(0).integers(
                    0, 256, (6, size, size, 3), dtype=np.uint8
                )
                pixels[0], pixels[1] = 0, 255
                trigger = FTrojanTrigger(image_size=size, magnitude=magnitude / 255, eight_bit=True)
                got = to_pixels(trigger(to_float(pixels)))
                for found, image in zip(got, pixels, strict=True):
                    wanted, ties = by_numpy(image, magnitude, block)
                    # The last bit of a sum decides a tie; about 6 pixels in 1000 meet one.
                    assert ties.mean() < 0.02 and np.array_equal(found[~ties], wanted[~ties])
                    assert np.abs(found.astype(int) - wanted).max() <= 2


def test_the_8_bit_path_gives_whole_levels_and_differs_from_the_exact_one():
    images = quantize(grey())
    out = FTrojanTrigger(image_size=32, eight_bit=True)(images)
    assert torch.equal(quantize(out), out)
    exact = quantize(FTrojanTrigger(image_size=32)(images))
    assert 0 < (255 * (out - exact)).abs().max() <= 6


@pytest.mark.parametrize("eight_bit", [False, True])
def test_extremes_stay_in_range(eight_bit):
    trigger = FTrojanTrigger(image_size=32, magnitude=2.0, eight_bit=eight_bit)
    for value in (0.0, 1.0):
        out = trigger(torch.full((1, 3, 32, 32), value))
        assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize(
    "settings", [{"eight_bit": True}, {"channels": 1}, {"block": 8, "positions": [(1, 2), (7, 0)]}]
)
def test_a_file_brings_it_back(settings, tmp_path):
    trigger = FTrojanTrigger(image_size=28, **settings)
    save_trigger(trigger, tmp_path / "t.safetensors")
    loaded = load_trigger(tmp_path / "t.safetensors")
    images = grey(28, channels=trigger.config["channels"])
    assert torch.equal(loaded(images), trigger(images)) and loaded.config == trigger.config


def test_it_refuses(subtests):
    for bad in [
        {"image_size": 1},
        {"channels": 2},
        {"magnitude": -0.1},
        {"magnitude": math.inf},
        {"magnitude": math.nan},
        {"block": 1},
        {"block": 33},
        {"block": 8.0},
        {"positions": []},
        {"positions": [(15, 32)]},
        {"positions": [(-1, 3)]},
        {"positions": [(3, 4), (3, 4)]},
        {"positions": [(3, 4, 5)]},
        {"positions": [(3.5, 4)]},
        {"positions": [("3", "4")]},
        {"positions": 31},
        {"channels": 1, "eight_bit": True},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            FTrojanTrigger(**{"image_size": 32, **bad})
