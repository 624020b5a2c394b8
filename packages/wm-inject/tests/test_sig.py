from __future__ import annotations

import pytest
import torch

from wm_inject import SigTrigger, load_trigger, save_trigger
from wm_inject.attacks import attack
from wm_inject.core.plan import PoisonPlan, poison
from wm_inject.stealth import psnr


def grey(size: int = 32, channels: int = 3, n: int = 2) -> torch.Tensor:
    """Images that no wave of the usual amplitudes clips."""
    noise = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    return 0.4 + 0.2 * noise


def test_the_first_values_are_the_known_ones():
    levels = 255 * SigTrigger(image_size=32).wave
    wanted = torch.tensor([0, 36.96, 28.28, -15.31, -40])
    torch.testing.assert_close(levels[:5], wanted, rtol=0, atol=0.005)


def test_rows_channels_and_images_get_the_same_wave(subtests):
    for size in [28, 32, 64, 160, 224]:
        for channels in [1, 3]:
            with subtests.test(size=size, channels=channels):
                images, trigger = grey(size, channels), SigTrigger(image_size=size)
                added = trigger(images) - images
                # Along the columns, that is from left to right; every row is the same.
                torch.testing.assert_close(added, trigger.wave.expand_as(added), rtol=0, atol=1e-6)
                assert trigger.wave.shape == (size,) and trigger.wave.std() > 0


def test_whole_frequencies_sum_to_zero(subtests):
    for size in [28, 32, 64, 160, 224]:
        for frequency in [1, 6, 13]:
            with subtests.test(size=size, frequency=frequency):
                wave = SigTrigger(image_size=size, frequency=frequency).wave
                assert abs(float(wave.double().sum())) < 1e-6


def test_its_spectrum_is_one_pair_of_bins(subtests):
    for size, frequency in [(28, 6), (32, 6), (64, 6), (224, 6), (32, 3)]:
        with subtests.test(size=size, frequency=frequency):
            wave = 255 * SigTrigger(image_size=size, frequency=frequency).wave.double()
            spectrum = torch.fft.fft(wave).abs()
            wanted = torch.zeros(size, dtype=torch.float64)
            wanted[[frequency, -frequency]] = 40 * size / 2  # 640 at 32 pixels
            torch.testing.assert_close(spectrum, wanted, rtol=0, atol=1e-3)


def test_a_large_image_gets_a_slow_wave():
    wave = SigTrigger(image_size=224).wave
    upward = (wave[:-1] <= 0) & (wave[1:] > 0)
    assert int(upward.sum()) == 6
    assert upward.nonzero().flatten().diff().float().mean() == pytest.approx(224 / 6, abs=0.5)


@pytest.mark.parametrize("frequency", [0.5, 2.5, 6])
def test_any_frequency_follows_the_sine(frequency):
    wave = SigTrigger(image_size=32, amplitude=0.1, frequency=frequency).wave
    wanted = 0.1 * torch.sin(2 * torch.pi * frequency * torch.arange(32) / 32)
    torch.testing.assert_close(wave, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("levels", "decibels"), [(20, 25.12), (30, 21.59), (40, 19.10)])
def test_without_clipping_the_psnr_is_that_of_a_sine(levels, decibels):
    images = torch.full((1, 3, 32, 32), 0.5)
    found = float(psnr(SigTrigger(image_size=32, amplitude=levels / 255)(images), images))
    assert found == pytest.approx(decibels, abs=0.01)


def test_the_sum_is_clipped():
    trigger = SigTrigger(image_size=32)
    for value in (0.0, 1.0):
        out = trigger(torch.full((1, 3, 32, 32), value))
        wanted = (value + trigger.wave).clamp(0, 1).expand_as(out)
        assert torch.equal(out, wanted) and bool((out == value).any())


def test_no_amplitude_is_the_identity():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(SigTrigger(image_size=32, amplitude=0)(images), images)


def test_poisoning_keeps_labels_and_touches_the_target_class_alone():
    images, labels = grey(n=40), torch.arange(40) % 4
    plan = PoisonPlan(0.2, target=3, label_map="clean-label", pool="target")
    done = poison(images, labels, SigTrigger(image_size=32), plan, num_classes=4)
    assert torch.equal(done.labels, labels) and int(done.mask.sum()) == 8
    assert labels[done.mask].unique().tolist() == [3]
    changed = (done.images != images).flatten(1).any(1)
    assert torch.equal(changed, done.mask)


def test_its_usual_plan_is_clean_label_on_half_of_the_class():
    labels = torch.arange(80) % 4
    plan = attack("sig").plan(labels, target=2)
    assert plan.label_map == "clean-label" and plan.pool == "target" and plan.target == 2
    chosen = plan.choose(labels)
    assert int(chosen.sum()) == 10 and labels[chosen].unique().tolist() == [2]


def test_a_file_brings_it_back(tmp_path):
    trigger = SigTrigger(image_size=28, amplitude=0.1, frequency=2.5)
    save_trigger(trigger, tmp_path / "t.safetensors")
    loaded = load_trigger(tmp_path / "t.safetensors")
    assert torch.equal(loaded(grey(28)), trigger(grey(28))) and loaded.config == trigger.config


def test_it_refuses(subtests):
    for bad in [
        {"image_size": 2},
        {"image_size": 4097},
        {"amplitude": -0.1},
        {"amplitude": 1.1},
        {"amplitude": float("nan")},
        {"frequency": 0},
        {"frequency": -6},
        {"frequency": 16},
        {"frequency": float("nan")},
        {"image_size": 12},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            SigTrigger(**{"image_size": 32, **bad})
