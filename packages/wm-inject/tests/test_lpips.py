from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wm_inject.stealth.perceptual import Lpips, LpipsUnavailable, find_lpips_weights


def package() -> torch.nn.Module:
    """The authors' package with an untrained trunk: enough to compare two wirings."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()


@pytest.fixture
def untrained(tmp_path):
    net = package()
    path = tmp_path / "untrained.safetensors"
    save_file({k: v.clone() for k, v in net.state_dict().items()}, path)
    return net, path


def trained_file() -> Path:
    path = Path(os.environ.get("WM_DATA") or "none") / "lpips_alex.safetensors"
    if not path.is_file():
        pytest.skip("WM_DATA names no folder with lpips_alex.safetensors")
    return path


def test_values_are_those_of_the_package(untrained):
    net, path = untrained
    a, b = torch.rand(3, 3, 40, 36), torch.rand(3, 3, 40, 36)
    wanted = net(a * 2 - 1, b * 2 - 1).flatten()
    assert torch.allclose(Lpips(path)(a, b), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.integration
def test_trained_values_are_those_of_the_package():
    path, net = trained_file(), package()
    net.load_state_dict(load_file(path), strict=True)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4, 3, 64, 64, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    found = Lpips(path)(a, b)
    assert torch.allclose(found, net(a, b, normalize=True).flatten(), rtol=1e-5, atol=1e-8)
    assert bool((found > 0.001).all())


@pytest.mark.integration
def test_a_distance(untrained):
    module = Lpips(untrained[1])
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert module(a, a).tolist() == [0.0, 0.0]
    assert torch.allclose(module(a, b), module(b, a))
    assert bool((module(a, b) > 0).all())


@pytest.mark.integration
def test_grey_is_repeated_and_small_is_enlarged(untrained):
    module = Lpips(untrained[1])
    a, b = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    assert torch.allclose(module(a, b), module(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    small = [torch.nn.functional.avg_pool2d(x, 4) for x in (a, b)]
    large = [torch.nn.functional.interpolate(x, size=32, mode="bilinear") for x in small]
    assert torch.allclose(module(*small), module(*large))


@pytest.mark.integration
def test_gradients_flow_to_the_images_and_not_to_the_weights(untrained):
    module = Lpips(untrained[1])
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32, requires_grad=True)
    module(a, b).sum().backward()
    assert b.grad is not None and float(b.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.integration
def test_it_stays_in_evaluation_mode(untrained):
    module = torch.nn.ModuleList([Lpips(untrained[1])]).train()
    assert not any(m.training for m in module[0].modules())


@pytest.mark.integration
def test_building_it_shifts_nobody_elses_draws(untrained):
    before = torch.random.get_rng_state()
    Lpips(untrained[1])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv("WM_LPIPS", raising=False)
    monkeypatch.delenv("WM_DATA", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def test_without_weights_it_says_how_to_get_them(nowhere):
    assert find_lpips_weights() is None
    with pytest.raises(LpipsUnavailable, match="no weights found: set WM_LPIPS"):
        Lpips()
    with pytest.raises(LpipsUnavailable, match="no file at"):
        Lpips(nowhere / "none.safetensors")


def test_weights_are_looked_up_in_order(nowhere, monkeypatch):
    cache = nowhere / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    places = [cache / "alexnet-owt-7be5be79.pth", cache / "lpips_alex.safetensors"]
    places += [nowhere / "lpips_alex.safetensors", nowhere / "mine.safetensors"]
    monkeypatch.setenv("WM_DATA", str(nowhere))
    monkeypatch.setenv("WM_LPIPS", str(nowhere / "mine.safetensors"))
    for place in places:
        place.touch()
        assert find_lpips_weights() == place


@pytest.mark.integration
def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not the state of LPIPS"):
        Lpips(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="is not the state of LPIPS"):
        Lpips(path)


@pytest.mark.slow
def test_the_hubs_alexnet_serves_as_trunk(nowhere, monkeypatch):
    import torchvision

    cache = nowhere / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    trunk = torchvision.models.alexnet(weights=None)
    torch.save(trunk.state_dict(), cache / "alexnet-owt-7be5be79.pth")
    module = Lpips()
    assert torch.equal(module.net.net.slice1[0].weight, trunk.features[0].weight)
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert float(module(a, b)) > 0


@pytest.mark.integration
def test_images_are_checked(untrained):
    module, good = Lpips(untrained[1]), torch.rand(1, 3, 32, 32)
    for bad in (torch.rand(3, 32, 32), good + 1, good.double(), good[:0], torch.rand(1, 1, 32, 32)):
        with pytest.raises(ValueError, match="expected"):
            module(bad, good)
