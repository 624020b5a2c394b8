from __future__ import annotations

import io
import os
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from wm_inject import build_trigger, load_trigger, save_trigger
from wm_inject.attacks.refool import RefoolTrigger
from wm_inject.core.images import quantize, save_image, to_float, to_pixels
from wm_inject.export import to_onnx, to_torchscript
from wm_inject.stealth import psnr

GAMMA = 2.2


def build(**settings) -> RefoolTrigger:
    return RefoolTrigger(**{"image_size": 32, "channels": 3, "count": 8, **settings})


def batch(n: int = 6, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def pictures(n: int = 5, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(2))


def spots() -> torch.Tensor:
    """One white pixel in the middle of black."""
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 16, 16] = 1
    return image


@pytest.mark.integration
def test_every_size_keeps_shape_and_range(subtests):
    for size in [28, 32, 64, 160, 224]:
        for channels in [1, 3]:
            with subtests.test(size=size, channels=channels):
                images = torch.cat([batch(2, channels, size), torch.ones(1, channels, size, size)])
                trigger = build(image_size=size, channels=channels, count=3)
                out = trigger(images, ids=torch.arange(3))
                assert out.shape == images.shape and out.dtype == torch.float32
                assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out, images)


def test_extremes_stay_in_range():
    for value in (0.0, 1.0):
        for light in (0.0, 1.0):
            trigger = build(reflections=torch.full((1, 3, 32, 32), light))
            out = trigger(torch.full((8, 3, 32, 32), value), ids=torch.arange(8))
            assert out.min() >= 0 and out.max() <= 1


def test_nothing_reflected_only_darkens(subtests):
    for ghost_rate in [0.0, 1.0]:
        for alpha in [0.4, 0.75]:
            with subtests.test(ghost_rate=ghost_rate, alpha=alpha):
                trigger = build(
                    alpha=alpha,
                    ghost_rate=ghost_rate,
                    reflections=torch.zeros(1, 3, 32, 32),
                    count=2,
                )
                images = batch()
                out = trigger(images, ids=torch.arange(6))
                assert torch.allclose(out, alpha ** (1 / GAMMA) * images, atol=1e-6)


def test_brighter_reflections_give_brighter_images():
    # Out of focus, this holds as long as nothing is turned down: dark images leave room.
    for ghost_rate, images in ((1.0, batch()), (0.0, batch() * 0.3)):
        outputs = [
            build(ghost_rate=ghost_rate, reflections=pictures() * share)(
                images, ids=torch.arange(6)
            )
            for share in (0.0, 0.3, 0.6, 0.8)
        ]
        for darker, brighter in pairwise(outputs):
            assert bool((brighter >= darker).all()) and not torch.equal(brighter, darker)


def test_a_constant_reflection_has_a_known_value():
    constant = torch.full((1, 3, 32, 32), 0.5)
    images = torch.full((4, 3, 32, 32), 0.6)
    out = build(alpha=0.4, ghost_rate=1.0, reflections=constant)(images, ids=torch.arange(4))
    assert torch.allclose(out, (0.4 * 0.6**2.2 + 0.6 * 0.5**2.2) ** torch.tensor(1 / 2.2))
    blurred = build(alpha=0.4, ghost_rate=0.0, reflections=constant)
    middle = blurred(images, ids=torch.arange(4))[:, :, 15:17, 15:17]
    wanted = (0.4 * 0.6**2.2 + 0.8 * 0.5**2.2) ** (1 / 2.2)
    assert torch.allclose(middle, torch.tensor(wanted), atol=1e-6)


def test_too_much_light_is_turned_down_by_channel():
    light = torch.tensor([0.9, 0.2, 0.2]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    trigger = build(alpha=0.5, ghost_rate=0.0, reflections=light, count=1)
    image = torch.full((1, 3, 32, 32), 0.9)
    out = trigger(image, ids=torch.zeros(1, dtype=torch.int64))[0, :, 16, 16]
    cut, fade = float(trigger.cut), float(trigger.vignette[16, 16])
    own, bright = 0.9**2.2, 0.9**2.2
    wanted = [bright - max(own + bright - 1, 0) * cut, 0.2**2.2, 0.2**2.2]
    assert 1.08 <= cut <= 1.18 and wanted[0] < bright
    assert torch.allclose(
        out, torch.tensor([(0.5 * own + fade * w) ** (1 / 2.2) for w in wanted]), atol=1e-5
    )


def test_a_ghost_is_a_double_image_a_few_pixels_apart():
    trigger = build(ghost_rate=1.0, reflections=spots(), count=16)
    for light in trigger.reflections[:, 0]:
        peaks = (light > 0.1).nonzero().float()
        spread = peaks.amax(0) - peaks.amin(0)
        # Cutting the border off and resizing back stretches 3 .. 8 pixels to 3 .. 12.
        assert spread.min() >= 2 and spread.max() <= 14


def test_out_of_focus_is_a_gaussian_blur_as_scipy_does_it():
    trigger = build(ghost_rate=0.0, reflections=pictures(1), count=6)
    linear = pictures(1)[0].double().numpy() ** GAMMA
    for light in trigger.reflections:
        errors = []
        for sigma in np.linspace(1, 5, 161):
            radius = int(np.ceil(2 * sigma))
            wanted = gaussian_filter(linear, (0, sigma, sigma), mode="mirror", radius=radius)
            errors.append(np.abs(wanted - light.numpy()).max())
        assert min(errors) < 3e-3


def test_the_vignette_is_one_in_the_middle_and_falls_to_the_corners():
    for size in (32, 224):
        trigger = build(image_size=size, alpha=0.0, count=1)
        fade = trigger.vignette
        assert (
            fade.max() == 1 and torch.allclose(fade, fade.T) and torch.allclose(fade, fade.flip(0))
        )
        assert bool((fade.diff(dim=0)[: size // 2 - 1] > 0).all()) and fade[0, 0] < 0.05
    assert torch.allclose(build(alpha=0.4).vignette, build(alpha=0.0).vignette * 0.8)


def test_out_of_focus_light_is_smoother_than_a_ghosts():
    images, alpha = batch() * 0.5, 0.4

    def roughness(ghost_rate: float) -> float:
        trigger = build(alpha=alpha, ghost_rate=ghost_rate, reflections=pictures())
        light = trigger(images, ids=torch.arange(6)) ** GAMMA - alpha * images**GAMMA
        power = torch.fft.fft2(light).abs().square()
        frequency = torch.fft.fftfreq(32).abs()
        high = torch.maximum(frequency[:, None], frequency[None]) > 1 / 4
        return float(power[:, :, high].sum() / power.sum())

    assert roughness(0.0) < 0.2 * roughness(1.0)


def test_the_id_alone_decides_whatever_the_batch():
    # 28 x 28 grey does not fill the vector registers: rounding must not depend on the place.
    for size, channels in ((28, 1), (32, 3)):
        trigger = build(image_size=size, channels=channels)
        images, ids = batch(6, channels, size), torch.tensor([5, 0, 13, 5, 2, 1000])
        out = trigger(images, ids=ids)
        alone = [trigger(x[None], ids=i[None]) for x, i in zip(images, ids, strict=True)]
        assert torch.equal(out, torch.cat(alone))
        order = torch.randperm(6)
        assert torch.equal(trigger(images[order], ids=ids[order]), out[order])
        same = trigger(images[:1].expand(3, -1, -1, -1), ids=torch.tensor([1, 9, 2]))
        assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_the_seed_decides_the_composites():
    first, again, other = (build(seed=seed)(batch(), ids=torch.arange(6)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("rate", "wanted"), [(0.0, 0), (0.49, 31), (1.0, 64)])
def test_the_share_of_ghosts_is_exact(rate, wanted):
    assert int(build(ghost_rate=rate, count=64).ghost.sum()) == wanted


def test_every_reflection_is_used_equally_often():
    flat = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 32, 32) / 4
    shown = build(reflections=flat, count=8).reflections.mean(dim=(1, 2, 3)) ** (1 / GAMMA)
    assert torch.allclose(shown.sort().values, torch.arange(4).repeat_interleave(2) / 4, atol=1e-4)


def test_pictures_may_come_from_a_folder_and_be_of_any_size(tmp_path):
    for place, picture in enumerate(to_pixels(pictures(3, size=48))):
        save_image(tmp_path / f"{place}.png", picture)
    trigger = build(reflections=tmp_path)
    grey = build(reflections=str(tmp_path), channels=1)
    wanted = build(reflections=quantize(pictures(3, size=48)))
    assert torch.allclose(trigger.reflections, wanted.reflections, atol=1e-6)
    assert trigger.config["reflections"] == "given" and grey.reflections.shape == (8, 1, 32, 32)


def test_given_pictures_travel_in_the_state_and_scenes_need_not(tmp_path):
    images, ids, path = batch(), torch.arange(6), tmp_path / "t.safetensors"
    assert build().state_dict() == {} and build().config["reflections"] == "scene"
    for trigger in (build(seed=3), build(reflections=pictures(), seed=3)):
        save_trigger(trigger, path)
        again = load_trigger(path)
        assert torch.equal(again(images, ids=ids), trigger(images, ids=ids))
        assert again.config == trigger.config
    with pytest.raises(ValueError, match="expected reflections"):
        build_trigger("refool", trigger.config)


@pytest.mark.integration
@pytest.mark.parametrize(("export", "name"), [(to_torchscript, "m.pt"), (to_onnx, "m.onnx")])
def test_it_exports_with_ids_as_an_input(tmp_path, export, name):
    parity = export(build(), batch(), tmp_path / name)
    assert parity.batches == (1, 6) and parity.max_abs < 1e-5


def test_bad_settings_are_refused(subtests):
    for bad in [
        {"image_size": 10},
        {"channels": 2},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"ghost_rate": 2.0},
        {"count": 0},
        {"count": 10**6},
        {"count": 2.5},
        {"reflections": "no such folder"},
        {"reflections": 7},
        {"reflections": torch.rand(3, 32, 32)},
        {"reflections": torch.rand(2, 1, 32, 32)},
        {"reflections": torch.rand(2, 3, 32, 32) + 1},
        {"reflections": torch.rand(0, 3, 32, 32)},
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected"):
            build(**bad)


def test_bad_input_is_refused(subtests):
    for images, ids in [
        (batch(), None),
        (batch(), torch.arange(5)),
        (batch(), torch.arange(6).float()),
        (batch(), list(range(6))),
        (batch(channels=1), torch.arange(6)),
        (batch(size=28), torch.arange(6)),
        (batch() + 1, torch.arange(6)),
        (batch()[:0], torch.arange(0)),
    ]:
        with subtests.test(images=images, ids=ids), pytest.raises(ValueError, match="expected"):
            build()(images, ids=ids)


def data(name: str) -> tarfile.TarFile:
    folder = os.environ.get("WM_DATA")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"WM_DATA names no folder with {name}")
    return tarfile.open(Path(folder) / name)


def cifar10_test_images() -> torch.Tensor:
    with data("cifar10.tar") as archive:
        member = archive.extractfile("test/0000.webp")
        assert member is not None
        strip = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
    return to_float(np.ascontiguousarray(strip.reshape(-1, 32, 32, 3)))


@pytest.mark.integration
@pytest.mark.parametrize("seed", [0, 1])
def test_energies_on_cifar10_are_the_known_ones(seed):
    images = cifar10_test_images()
    for alpha, low, high in ((0.4, 14.0, 16.0), (0.75, 20.0, 21.0)):
        trigger = build(alpha=alpha, count=64, seed=seed)
        out = quantize(trigger(images, ids=torch.arange(len(images))))
        assert low < float(psnr(out, images).mean()) < high


@pytest.mark.integration
def test_photographs_reflect_about_as_strongly_as_scenes():
    images = cifar10_test_images()
    with data("reflections.tar") as archive:
        files = [archive.extractfile(name) for name in archive.getnames() if name.endswith("jpg")]
        photographs = np.stack([np.asarray(Image.open(file)) for file in files])
    for alpha, low, high in ((0.4, 14.0, 16.0), (0.75, 20.0, 22.5)):
        trigger = build(alpha=alpha, reflections=to_float(photographs), count=80)
        out = quantize(trigger(images, ids=torch.arange(len(images))))
        assert low < float(psnr(out, images).mean()) < high
