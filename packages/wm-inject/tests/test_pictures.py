from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from wm_inject.attacks.pictures import PICTURES, cartoon, load_picture, logo, noise, scene
from wm_inject.core.images import load_image, save_image, to_float

DRAWN = ("cartoon", "scene", "logo")

every = pytest.mark.parametrize("name", PICTURES)
every_drawn = pytest.mark.parametrize("name", DRAWN)


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of all values."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_every_size_has_shape_and_range(subtests):
    for name in PICTURES:
        for channels in [1, 3]:
            for size in [1, 8, 28, 32, 64, 160, 224]:
                with subtests.test(name=name, channels=channels, size=size):
                    picture = PICTURES[name](size, channels=channels)
                    assert (
                        picture.shape == (channels, size, size) and picture.dtype == torch.float32
                    )
                    assert picture.min() >= 0 and picture.max() <= 1 and picture.is_contiguous()


def test_the_seed_is_the_only_source_of_chance(subtests):
    for name in PICTURES:
        for channels in [1, 3]:
            with subtests.test(name=name, channels=channels):
                torch.manual_seed(5)
                state = torch.get_rng_state()
                first, again = (PICTURES[name](32, channels=channels, seed=3) for _ in range(2))
                assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


def test_seeds_give_different_pictures(subtests):
    for name in PICTURES:
        for channels in [1, 3]:
            with subtests.test(name=name, channels=channels):
                drawn = torch.stack(
                    [PICTURES[name](32, channels=channels, seed=s) for s in range(12)]
                )
                apart = [
                    float((a - b).abs().mean()) for i, a in enumerate(drawn) for b in drawn[:i]
                ]
                assert min(apart) > 0.02


def test_one_seed_shows_the_same_picture_at_every_size(subtests):
    for name in DRAWN:
        for seed in range(4):
            for small, large in [(28, 112), (32, 64), (32, 224), (64, 160)]:
                with subtests.test(name=name, seed=seed, small=small, large=large):
                    wanted = PICTURES[name](small, channels=3, seed=seed)
                    fine = PICTURES[name](large, channels=3, seed=seed)
                    shrunk = F.interpolate(
                        fine[None], size=(small, small), mode="bilinear", antialias=True
                    )[0]
                    other = PICTURES[name](small, channels=3, seed=seed + 10)
                    assert alike(shrunk, wanted) > 0.95 and (shrunk - wanted).abs().mean() < 0.06
                    # Cartoons of other seeds have the same layout, so they are the closest.
                    assert alike(shrunk, wanted) > alike(shrunk, other) + 0.1


def test_grey_is_the_luma_of_the_colours(subtests):
    for name in ["cartoon", "scene"]:
        for seed in range(4):
            with subtests.test(name=name, seed=seed):
                colour = PICTURES[name](32, channels=3, seed=seed)
                luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(
                    0, keepdim=True
                )
                torch.testing.assert_close(PICTURES[name](32, channels=1, seed=seed), luma)


def test_noise_is_uniform_and_independent():
    picture = noise(224, channels=3)
    histogram = torch.histc(picture, bins=10, min=0, max=1) / picture.numel()
    assert (histogram - 0.1).abs().max() < 0.005
    pairs = [
        (picture[0], picture[1]),
        (picture[1], picture[2]),
        (picture[:, 1:], picture[:, :-1]),
        (picture[..., 1:], picture[..., :-1]),
    ]
    assert all(abs(alike(a, b)) < 0.02 for a, b in pairs)


def test_cartoons_are_light_and_flat_with_dark_lines(subtests):
    for seed in range(8):
        with subtests.test(seed=seed):
            picture = cartoon(128, channels=3, seed=seed)
            flat = (picture[..., 1:] - picture[..., :-1]).abs().amax(0) < 1e-6
            assert picture.mean() > 0.6 and flat.float().mean() > 0.7
            assert (picture.amax(0) < 0.15).float().mean() > 0.01


def test_scenes_have_the_spectrum_of_photographs(subtests):
    """Power falls about as the square of the frequency, a little faster or slower."""
    for seed in range(8):
        with subtests.test(seed=seed):
            plane = scene(128, channels=1, seed=seed)[0]
            power = torch.fft.fft2(plane - plane.mean()).abs().square()
            rate = torch.fft.fftfreq(128) * 128
            radius = (rate[:, None].square() + rate.square()).sqrt()
            steps = range(2, 60)
            rings = [power[(radius >= step - 0.5) & (radius < step + 0.5)].mean() for step in steps]
            slope, _ = np.polyfit(np.log(list(steps)), np.log(torch.stack(rings).numpy()), 1)
            assert -3.2 < slope < -1.6
            assert plane.std() > 0.04


def test_logos_have_full_contrast_in_every_channel(subtests):
    for seed in range(8):
        for channels in [1, 3]:
            with subtests.test(seed=seed, channels=channels):
                planes = logo(64, channels=channels, seed=seed).flatten(1)
                assert (planes.amax(1) > 0.99).all() and (planes.amin(1) < 0.01).all()
                assert (planes.std(1) > 0.35).all()


def test_a_name_loads_the_picture_of_that_name(subtests):
    for name in PICTURES:
        with subtests.test(name=name):
            wanted = PICTURES[name](28, channels=3, seed=4)
            assert torch.equal(load_picture(name, size=28, channels=3, seed=4), wanted)


def test_a_file_is_resized_whatever_its_aspect(tmp_path, subtests):
    for channels in [1, 3]:
        for kind in [str, lambda path: path]:
            with subtests.test(channels=channels, kind=kind):
                path = tmp_path / "p.png"
                save_image(
                    path, np.random.default_rng(0).integers(0, 256, (9, 21, 3), dtype=np.uint8)
                )
                wanted = to_float(load_image(path, size=16, channels=channels)[None])[0]
                got = load_picture(kind(path), size=16, channels=channels)
                assert got.shape == (channels, 16, 16) and torch.equal(got, wanted)


def test_a_tensor_is_taken_as_it_is_and_copied():
    given = torch.rand(3, 16, 16, requires_grad=True)
    got = load_picture(given, size=16, channels=3)
    assert torch.equal(got, given) and not got.requires_grad
    assert got.data_ptr() != given.data_ptr()


def test_pictures_refuse(subtests):
    for name in PICTURES:
        for bad in [{"size": 0}, {"size": 4097}, {"channels": 2}]:
            with subtests.test(name=name, bad=bad):
                settings = {"size": 16, "channels": 3, **bad}
                with pytest.raises(ValueError, match="expected"):
                    PICTURES[name](settings["size"], channels=settings["channels"])
                with pytest.raises(ValueError, match="expected"):
                    load_picture(name, **settings)


def test_loading_refuses_what_is_no_picture(subtests):
    for bad in [
        "kitten",
        7,
        None,
        torch.rand(16, 16),
        torch.rand(1, 3, 16, 16),
        torch.rand(1, 16, 16),
        torch.rand(3, 16, 17),
        torch.rand(3, 16, 16).double(),
        torch.rand(3, 16, 16) + 1,
        torch.full((3, 16, 16), float("nan")),
    ]:
        with subtests.test(bad=bad):
            with pytest.raises(ValueError, match="expected") as caught:
                load_picture(bad, size=16, channels=3)
            assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "p.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read p\.png"):
        load_picture(tmp_path / "p.png", size=16, channels=3)


def test_a_refusal_calls_the_picture_by_its_name():
    with pytest.raises(ValueError, match="expected watermark"):
        load_picture(torch.rand(1, 3, 3), size=16, channels=1, name="watermark")
    with pytest.raises(ValueError, match="expected watermark as one of noise, cartoon"):
        load_picture(torch.rand(3, 3), size=16, channels=1, name="watermark")
