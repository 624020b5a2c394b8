from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wm_inject.core.images import load_image, save_image, to_pixels
from wm_inject.stealth import compare_folders, linf, psnr, ssim


def pair(n: int = 4, channels: int = 3, side: int = 24, seed: int = 0, noise: float = 0.05):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool2d(
        torch.rand(n, channels, side + 2, side + 4, generator=generator), 3, stride=1
    )  # (n, channels, side, side + 2)
    changed = smooth + noise * torch.randn(smooth.shape, generator=generator)
    return changed.clamp(0, 1), smooth


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1, 3]), st.floats(0.001, 0.5))
def test_psnr_and_ssim_agree_with_scikit_image(seed, channels, noise):
    images, reference = pair(2, channels, seed=seed, noise=noise)
    psnrs, ssims = psnr(images, reference), ssim(images, reference)
    pairs = zip(images.double().numpy(), reference.double().numpy(), strict=True)
    for i, (a, b) in enumerate(pairs):
        wanted = peak_signal_noise_ratio(b, a, data_range=1)
        assert float(psnrs[i]) == pytest.approx(wanted, abs=1e-4)
        # scikit-image averages over the positions where its window lies inside, as we do.
        wanted = structural_similarity(
            a,
            b,
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(ssims[i]) == pytest.approx(wanted, abs=1e-6)


def test_equal_images():
    images, _ = pair()
    assert psnr(images, images).tolist() == [100.0] * 4
    assert torch.allclose(ssim(images, images), torch.ones(4))
    assert linf(images, images).tolist() == [0.0] * 4


def test_metrics_are_symmetric():
    images, reference = pair()
    for metric in (psnr, ssim, linf):
        assert torch.allclose(metric(images, reference), metric(reference, images))


@pytest.mark.parametrize("offset", [0.5, 0.1, 1 / 255, 1e-4])
def test_psnr_of_a_constant_offset(offset):
    reference = torch.full((1, 1, 12, 12), 0.25)
    found = float(psnr(reference + offset, reference))
    assert found == pytest.approx(-20 * math.log10(offset), abs=0.01)


def test_psnr_is_capped_at_100():
    reference = torch.zeros(1, 1, 12, 12)
    assert float(psnr(reference + 2e-6, reference)) == 100.0


def test_psnr_with_another_range():
    images, reference = pair()
    found = psnr(images * 255, reference * 255, data_range=255.0)
    assert torch.allclose(found, psnr(images, reference), atol=1e-3)


def test_more_noise_is_more_visible():
    levels = [pair(noise=noise) for noise in (0.01, 0.05, 0.2)]
    for metric in (psnr, ssim):
        values = [float(metric(*level).mean()) for level in levels]
        assert values == sorted(values, reverse=True)
        assert all(-1 <= float(v) <= 1 for v in ssim(*levels[2]))


def test_linf_is_the_largest_difference():
    reference = torch.zeros(2, 1, 12, 12)
    images = reference.clone()
    images[1, 0, 3, 4] = 0.75
    assert linf(images, reference).tolist() == [0.0, 0.75]


def test_many_images_give_the_same_as_few():
    images, reference = pair(300, 1, 12)
    for metric in (psnr, ssim):
        alone = torch.cat([metric(images[i : i + 1], reference[i : i + 1]) for i in (0, 257, 299)])
        assert torch.equal(metric(images, reference)[[0, 257, 299]], alone)


@pytest.mark.parametrize("metric", [psnr, ssim, linf])
def test_metrics_refuse(metric):
    good = torch.rand(1, 3, 16, 16)
    for bad in (
        torch.rand(3, 16, 16),
        torch.rand(0, 3, 16, 16),
        good.double(),
        good + 1,
        torch.rand(1, 1, 16, 16),
        [1],
    ):
        with pytest.raises(ValueError, match="expected"):
            metric(bad, good)
        with pytest.raises(ValueError, match="expected"):
            metric(good, bad)


def test_special_refusals():
    small = torch.rand(1, 1, 10, 32)
    with pytest.raises(ValueError, match="sides of at least 11"):
        ssim(small, small)
    with pytest.raises(ValueError, match="data range"):
        psnr(small, small, data_range=0.0)


def write(folder, images, names):
    for name, pixels in zip(names, to_pixels(images), strict=True):
        save_image(folder / name, pixels)


def test_folders_are_compared_pair_by_pair(tmp_path):
    images, reference = pair(3, side=30)
    names = ["a/x.png", "a/y.png", "b.png"]
    write(tmp_path / "new", images, names)
    write(tmp_path / "old", reference, names)
    found = compare_folders(tmp_path / "old", tmp_path / "new", batch_size=2)
    assert found.files == tuple(names) and found.lpips is None
    stored = [torch.from_numpy(to_pixels(x)).permute(0, 3, 1, 2) / 255 for x in (images, reference)]
    assert torch.allclose(found.psnr, psnr(*stored), atol=1e-4)
    assert torch.allclose(found.ssim, ssim(*stored), atol=1e-6)
    assert torch.allclose(found.linf, linf(*stored))


def test_images_are_compared_at_the_size_of_the_originals_and_on_request_at_their_own(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    save_image(tmp_path / "old" / "a.png", noise)
    save_image(tmp_path / "old" / "b.png", noise)
    save_image(tmp_path / "new" / "a.png", load_image(tmp_path / "old" / "a.png", size=16))
    save_image(tmp_path / "new" / "b.png", noise)
    at_originals = compare_folders(tmp_path / "old", tmp_path / "new")
    small = compare_folders(tmp_path / "old", tmp_path / "new", at="changed")
    enlarged = Image.fromarray(load_image(tmp_path / "new" / "a.png"))
    enlarged = np.asarray(enlarged.resize((40, 48), Image.Resampling.BILINEAR))
    expected = peak_signal_noise_ratio(noise, enlarged)
    assert (
        at_originals.psnr.tolist() == pytest.approx([expected, 100.0], abs=1e-3) and expected < 20
    )
    assert small.psnr.tolist() == [100.0, 100.0]
    assert at_originals.sizes == small.sizes == (((40, 48), (16, 16)), ((40, 48), (40, 48)))
    assert at_originals.resized == {((40, 48), (16, 16)): 1}
    with pytest.raises(ValueError, match="expected at in original, changed"):
        compare_folders(tmp_path / "old", tmp_path / "new", at="both")


def test_a_grey_image_is_compared_with_its_original_in_grey(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    save_image(tmp_path / "old" / "a.png", pixels)
    save_image(tmp_path / "new" / "a.png", load_image(tmp_path / "old" / "a.png", channels=1))
    assert compare_folders(tmp_path / "old", tmp_path / "new").psnr.tolist() == [100.0]


def test_a_changed_image_without_original_is_refused(tmp_path):
    images, _ = pair(1)
    write(tmp_path / "new", images, ["a.png"])
    write(tmp_path / "old", images, ["b.png"])
    with pytest.raises(ValueError, match=r"expected an original of a\.png"):
        compare_folders(tmp_path / "old", tmp_path / "new")


def test_a_folder_says_how_alike_its_changes_are(tmp_path):
    pattern = np.random.default_rng(1).integers(0, 9, (20, 24, 3)).astype(np.uint8)
    for place in range(5):
        image = np.random.default_rng(place + 2).integers(0, 200, (20, 24, 3)).astype(np.uint8)
        save_image(tmp_path / "in" / f"{place}.png", image)
        # The last one is not changed, and does not count.
        save_image(tmp_path / "out" / f"{place}.png", image + pattern * (place < 4))
    found = compare_folders(tmp_path / "in", tmp_path / "out").dependence
    assert found is not None and found.images == 4
    assert found.universal == pytest.approx(1) and found.cosine == pytest.approx(1)
    (tmp_path / "out" / "0.png").write_bytes((tmp_path / "in" / "0.png").read_bytes())
    (tmp_path / "out" / "1.png").write_bytes((tmp_path / "in" / "1.png").read_bytes())
    (tmp_path / "out" / "2.png").write_bytes((tmp_path / "in" / "2.png").read_bytes())
    assert compare_folders(tmp_path / "in", tmp_path / "out").dependence is None
