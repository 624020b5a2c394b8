from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wm_inject import load_trigger, save_trigger
from wm_inject.attacks.blindnet import BlindNetTrigger, calibrate_blindnet, watermark_side
from wm_inject.attacks.pictures import scene
from wm_inject.core.checkpoint import CheckpointError, save_checkpoint
from wm_inject.core.images import load_image, quantize, save_image, to_float
from wm_inject.stealth import psnr

every_shape = pytest.mark.parametrize(
    ("size", "channels"), [(s, c) for s in (28, 32, 64, 160, 224) for c in (1, 3)]
)


def build(**settings) -> BlindNetTrigger:
    return BlindNetTrigger(**{"image_size": 32, "channels": 3, **settings})


def grey(size: int = 32, channels: int = 3, n: int = 3) -> torch.Tensor:
    """Images that the trigger does not clip."""
    noise = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    return 0.3 + 0.4 * noise


def radius(size: int) -> torch.Tensor:
    """Radial frequency in cycles per pixel, in the order of the transform."""
    rate = torch.from_numpy(np.fft.fftfreq(size))
    return torch.hypot(*torch.meshgrid(rate, rate, indexing="ij"))


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of all values."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_the_spectrum_is_real_and_point_symmetric(subtests):
    for size, channels in [(s, c) for s in (28, 32, 64, 160, 224) for c in (1, 3)]:
        with subtests.test(size=size, channels=channels):
            spectrum = torch.fft.fft2(build(image_size=size, channels=channels).pattern.double())
            assert spectrum.imag.abs().max() < 1e-6
            mirrored = spectrum.real.flip(1, 2).roll((1, 1), (1, 2))
            torch.testing.assert_close(spectrum.real, mirrored, rtol=0, atol=1e-6)
            # So nothing but rounding is dropped on the way back.
            assert torch.fft.ifft2(spectrum.real).imag.abs().max() < 1e-6


def test_every_unclipped_image_gets_the_same_difference(subtests):
    for size, channels in [(s, c) for s in (28, 32, 64, 160, 224) for c in (1, 3)]:
        with subtests.test(size=size, channels=channels):
            trigger, images = build(image_size=size, channels=channels), grey(size, channels)
            difference = trigger(images) - images
            wanted = trigger.pattern.expand_as(difference)
            torch.testing.assert_close(difference, wanted, rtol=0, atol=1e-6)


def test_the_difference_lies_in_the_band_alone(subtests):
    for size, channels in [(s, c) for s in (28, 32, 64, 160, 224) for c in (1, 3)]:
        with subtests.test(size=size, channels=channels):
            trigger, images = build(image_size=size, channels=channels), grey(size, channels)
            spectrum = torch.fft.fft2((trigger(images) - images).double()).abs()
            inside = (radius(size) >= 0.25) & (radius(size) <= 0.45)
            assert spectrum[..., ~inside].max() < 1e-3 * spectrum.max()
            # The mean is one of those frequencies: brightness stays.
            assert spectrum[..., 0, 0].max() < 1e-3 * spectrum.max()


def test_another_band_is_kept_too():
    spectrum = torch.fft.fft2(build(band=(0.1, 0.2)).pattern.double()).abs()
    inside = (radius(32) >= 0.1) & (radius(32) <= 0.2)
    assert spectrum[:, ~inside].max() < 1e-6 and spectrum[:, inside].max() > 0.1


def test_the_watermark_is_read_back(subtests):
    for size, channels in [(s, c) for s in (28, 32, 64, 160, 224) for c in (1, 3)]:
        with subtests.test(size=size, channels=channels):
            trigger, images = build(image_size=size, channels=channels), grey(size, channels)
            side = watermark_side(size)
            found = trigger.extract(trigger(images), images)
            assert found.shape == (3, 1, side, side)
            for one in found:
                assert alike(one, trigger.watermark) > 0.95


def test_reading_survives_8_bits_and_needs_the_seed():
    trigger, other, images = build(), build(seed=1), grey()
    for poisoned in (trigger(images), quantize(trigger(images))):
        assert min(alike(one, trigger.watermark) for one in trigger.extract(poisoned, images)) > 0.9
        for one in other.extract(poisoned, images):
            assert abs(alike(one, trigger.watermark)) < 0.3
            assert abs(alike(one, other.watermark)) < 0.3


def test_strength_is_the_root_mean_square(subtests):
    for strength in [0.0, 0.01, 0.0193, 0.1]:
        with subtests.test(strength=strength):
            pattern = build(strength=strength).pattern.double()
            assert float(pattern.square().mean().sqrt()) == pytest.approx(strength, rel=1e-5)
            assert pattern.mean().abs() < 1e-7


def test_the_default_strength_is_that_of_the_published_psnr():
    images = torch.full((1, 3, 32, 32), 0.5)
    assert float(psnr(build()(images), images)) == pytest.approx(34.3, abs=0.01)


def test_the_seed_gives_the_pattern():
    first, again, other = (build(seed=seed).pattern for seed in (0, 0, 1))
    assert torch.equal(first, again) and abs(alike(first, other)) < 0.2
    picture = torch.rand(1, 15, 15, generator=torch.Generator().manual_seed(0))
    a, b = (build(watermark=picture, seed=seed).pattern for seed in (0, 1))
    assert abs(alike(a, b)) < 0.2
    # Each channel has a permutation of its own, or the pattern would be grey.
    assert abs(alike(a[0], a[1])) < 0.2 and abs(alike(a[1], a[2])) < 0.2


def test_extremes_stay_in_range():
    for value in (0.0, 1.0):
        out = build(strength=0.5)(torch.full((1, 3, 32, 32), value))
        assert out.min() >= 0 and out.max() <= 1


@pytest.mark.integration
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("target", [30.0, 34.3, 40.0])
def test_calibration_meets_its_psnr_on_other_images(size, channels, target):
    scenes = torch.stack([scene(size, channels=channels, seed=seed) for seed in range(32)])
    trigger = build(image_size=size, channels=channels, seed=2)
    before = trigger.pattern.clone()
    made = calibrate_blindnet(trigger, scenes[:16], psnr_target=target)
    held_out = quantize(scenes[16:])
    found = float(psnr(quantize(made(held_out)), held_out).mean())
    assert found == pytest.approx(target, abs=0.3)
    assert torch.equal(trigger.pattern, before)
    assert made.config == {**trigger.config, "strength": made.config["strength"]}


def test_calibration_makes_up_for_clipping():
    """Half of what is added to black or white is lost, so the pattern must be stronger."""
    images = torch.cat([torch.zeros(4, 3, 32, 32), torch.ones(4, 3, 32, 32)])
    made = calibrate_blindnet(build(), images)
    assert float(psnr(quantize(made(images)), images).mean()) == pytest.approx(34.3, abs=0.3)
    assert made.config["strength"] > 1.3 * 10 ** (-34.3 / 20)


def test_calibration_counts_the_rounding_to_8_bits():
    """At 45 dB the pattern is about one level, and rounding adds a twelfth of one squared."""
    images = quantize(grey(n=8))
    made = calibrate_blindnet(build(), images, psnr_target=45)
    assert float(psnr(quantize(made(images)), images).mean()) == pytest.approx(45, abs=0.02)
    assert float(psnr(made(images), images).mean()) > 45.1


def test_calibration_keeps_a_given_watermark():
    picture = torch.rand(1, 15, 15, generator=torch.Generator().manual_seed(0))
    made = calibrate_blindnet(build(watermark=picture), grey())
    assert torch.equal(made.watermark, picture)


def test_a_drawn_watermark_needs_no_file(tmp_path, subtests):
    for name in ["noise", "cartoon", "scene", "logo"]:
        with subtests.test(name=name):
            trigger = build(watermark=name, seed=3)
            assert trigger.config["watermark"] == name and "watermark" not in trigger.state_dict()
            save_trigger(trigger, tmp_path / "t.safetensors")
            assert torch.equal(load_trigger(tmp_path / "t.safetensors").pattern, trigger.pattern)


def test_a_given_watermark_travels_with_the_trigger(tmp_path):
    path = tmp_path / "w.png"
    save_image(path, np.random.default_rng(0).integers(0, 256, (9, 21, 1), dtype=np.uint8))
    as_file = build(watermark=path, seed=4)
    wanted = to_float(load_image(path, size=15, channels=1)[None])[0]
    assert torch.equal(as_file.watermark, wanted)
    as_tensor = build(watermark=wanted, seed=4)
    assert torch.equal(as_tensor.pattern, as_file.pattern)
    save_trigger(as_file, tmp_path / "t.safetensors")
    path.unlink()
    loaded = load_trigger(tmp_path / "t.safetensors")
    assert loaded.config == as_file.config and loaded.config["watermark"] == "given"
    assert torch.equal(loaded.watermark, wanted)
    assert torch.equal(loaded(grey()), as_file(grey()))
    assert alike(loaded.extract(loaded(grey()), grey())[0], wanted) > 0.95


def test_the_watermark_fills_the_band(subtests):
    for size in [8, 28, 32, 64, 224]:
        with subtests.test(size=size):
            side = watermark_side(size)
            assert build(image_size=size).watermark.shape == (1, side, side)
            room = int(((radius(size) >= 0.25) & (radius(size) <= 0.45)).sum()) // 2
            assert side**2 <= room < (side + 1) ** 2
            assert watermark_side(32) == 15


def test_it_refuses(subtests):
    for bad in [
        {"image_size": 7},
        {"image_size": 4097},
        {"channels": 2},
        {"strength": -0.1},
        {"strength": 1.1},
        {"strength": math.nan},
        {"band": (0.0, 0.4)},
        {"band": (0.4, 0.4)},
        {"band": (0.4, 0.6)},
        {"band": (0.3, 0.301)},
        {"band": (math.nan, 0.4)},
        {"band": (0.25,)},
        {"band": (0.1, 0.2, 0.3)},
        {"band": 0.3},
        {"band": "wide"},
        {"watermark": "none.png"},
        {"watermark": None},
        {"watermark": torch.full((1, 15, 15), 0.5)},
        {"watermark": torch.rand(1, 14, 14)},
        {"watermark": torch.rand(3, 15, 15)},
        {"watermark": torch.rand(1, 15, 15) + 1},
    ]:
        with subtests.test(bad=bad):
            with pytest.raises(ValueError, match="expected") as caught:
                build(**bad)
            assert "\n" not in str(caught.value)


def test_a_file_with_a_bad_band_is_refused(tmp_path):
    config = {**build().config, "band": [0.25]}
    save_checkpoint(
        tmp_path / "t.safetensors", kind="blindnet", config=config, state={"x": torch.zeros(1)}
    )
    with pytest.raises(CheckpointError, match="holds no usable trigger"):
        load_trigger(tmp_path / "t.safetensors")


def test_no_side_for_a_bad_band(subtests):
    for band in [(0.0, 0.4), (0.4, 0.6), (0.3, 0.301), (0.25,)]:
        with subtests.test(band=band), pytest.raises(ValueError, match="expected a band"):
            watermark_side(32, band=band)


@pytest.mark.parametrize("bad", [14.9, 45.1, math.nan])
def test_calibration_refuses_targets_out_of_range(bad):
    with pytest.raises(ValueError, match="expected psnr_target"):
        calibrate_blindnet(build(), grey(), psnr_target=bad)


def test_calibration_and_reading_refuse_bad_images(subtests):
    for bad in [grey()[0], grey()[:0], grey().double(), grey() + 1, grey(16), grey(channels=1)]:
        with subtests.test(bad=bad):
            with pytest.raises(ValueError, match="expected"):
                calibrate_blindnet(build(), bad)
            with pytest.raises(ValueError, match=r"expected .*poisoned"):
                build().extract(bad, grey())
            with pytest.raises(ValueError, match=r"expected .*originals"):
                build().extract(grey(), bad)


def test_reading_refuses_another_number_of_originals():
    with pytest.raises(ValueError, match="expected as many originals"):
        build().extract(grey(), grey(n=2))
