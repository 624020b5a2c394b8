from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wm_inject import load_trigger, save_trigger
from wm_inject.attacks.watermark import WatermarkTrigger
from wm_inject.watermark.picture import default_watermark
from wm_inject.watermark.vit import ViTInjector

CONFIG = {
    "image_size": 32,
    "channels": 1,
    "patch_size": 4,
    "width": 16,
    "heads": 2,
    "depth": 1,
    "decoder_depth": 1,
}


def trigger(strength: float = 1.0) -> WatermarkTrigger:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        injector = ViTInjector(**CONFIG)
        torch.nn.init.normal_(injector.head.weight, std=0.05)
    return WatermarkTrigger(injector, strength=strength)


def images() -> Tensor:
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2


def test_keeps_the_contract_and_scales_with_strength() -> None:
    x = images()
    whole, half = trigger()(x), trigger(0.5)(x)
    assert whole.shape == x.shape and whole.min() >= 0 and whole.max() <= 1
    inside = (whole > 0) & (whole < 1)
    assert torch.allclose(((half - x) * 2)[inside], (whole - x)[inside], atol=1e-6)
    assert torch.equal(trigger(0.0)(x), x)


def test_saves_and_loads_to_the_same_output(tmp_path: Path) -> None:
    mark = 1 - default_watermark(32)
    original = WatermarkTrigger(trigger().injector, watermark=mark, strength=0.7)
    save_trigger(original, tmp_path / "t.safetensors")
    loaded = load_trigger(tmp_path / "t.safetensors")
    assert torch.equal(loaded(images()), original(images()))


@pytest.mark.parametrize("size", [(96, 80), (32, 64), (24, 20)])
def test_images_of_another_size_get_the_change_of_their_small_copies(size: tuple[int, int]) -> None:
    whole = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    settings = {"mode": "bilinear", "antialias": True}
    small = torch.nn.functional.interpolate(whole, (32, 32), **settings)
    one = trigger()
    change = one.injector(small, one.watermark) - small
    change = torch.nn.functional.interpolate(change, size, **settings)
    marked = one(whole)
    assert marked.shape == whole.shape
    assert torch.allclose(marked, (whole + change).clamp(0, 1), atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="strength >= 0"):
        trigger(-1)
    with pytest.raises(ValueError, match="got neither"):
        WatermarkTrigger()
    with pytest.raises(ValueError, match="watermark of shape"):
        WatermarkTrigger(trigger().injector, watermark=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="shape"):
        trigger()(torch.rand(2, 3, 32, 32))
