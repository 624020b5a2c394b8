"""What the twelve triggers have in common: contract, files, export, the torch-free runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wm_inject import (
    Poisoner,
    ViTInjector,
    build_trigger,
    load_trigger,
    save_trigger,
    to_onnx,
    to_pixels,
    to_torchscript,
    vit_config,
)
from wm_inject.attacks import TRIGGER_KINDS
from wm_inject.core.whole_pictures import ANY_SIZE

CLASSES = 5
COLOURED = ("blend", "refool", "blindnet", "ssba", "ftrojan", "lf", "marksman", "input-aware")
SHAPES = [(28, 1), (32, 3)]


def small(kind: str, side: int, channels: int) -> dict[str, Any]:
    """Settings of a cheap trigger of this kind."""
    settings: dict[str, Any] = {"image_size": side}
    if kind in COLOURED:
        settings["channels"] = channels
    if kind == "watermark":
        shape = vit_config("tiny", image_size=side, channels=channels)
        config = ViTInjector(**{**shape, "depth": 1, "decoder_depth": 1}).config
        return {"injector_config": config}
    extra: dict[str, dict[str, Any]] = {
        "marksman": {"num_classes": CLASSES, "width": 4},
        "input-aware": {"width": 4},
        "ssba": {"width": 8, "bits": 16},
        "refool": {"count": 8},
    }
    return settings | extra.get(kind, {})


def make(kind: str, side: int = 32, channels: int = 3) -> nn.Module:
    """A trigger whose weights are not those of an untrained, silent one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trigger = build_trigger(kind, small(kind, side, channels))
        for name, tensor in trigger.state_dict().items():
            if kind == "lf" and name == "pattern":
                tensor.uniform_(0, 0.2)
            elif kind in ("watermark", "ssba") and tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor)) if "watermark" not in name else None
    return trigger.eval()


def batch(side: int = 32, channels: int = 3, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, channels, side, side, generator=generator) * 0.8 + 0.1


def extras(trigger: nn.Module, count: int = 4) -> dict[str, Tensor]:
    """What a trigger asks for beside the images."""
    asked: dict[str, Tensor] = {}
    if getattr(trigger, "needs_ids", False):
        asked["ids"] = torch.arange(count) * 13 + 1
    if getattr(trigger, "needs_target", False):
        asked["target"] = torch.arange(count) % CLASSES
    return asked


@pytest.mark.integration
@pytest.mark.parametrize("kind", TRIGGER_KINDS)
@pytest.mark.parametrize(("side", "channels"), SHAPES)
def test_contract(kind: str, side: int, channels: int) -> None:
    trigger, images = make(kind, side, channels), batch(side, channels)
    before, asked = images.clone(), extras(trigger)
    with torch.no_grad():
        out = trigger(images, **asked)
        again = trigger(images, **asked)
        alone = torch.cat(
            [
                trigger(images[i : i + 1], **{k: v[i : i + 1] for k, v in asked.items()})
                for i in range(4)
            ]
        )
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert torch.equal(images, before) and torch.equal(out, again)
    assert not torch.equal(out, images)
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-5)


@pytest.mark.integration
def test_larger_sizes(subtests: pytest.Subtests) -> None:
    for kind in TRIGGER_KINDS:
        for side in [64, 160, 224]:
            with subtests.test(kind=kind, side=side):
                trigger, images = make(kind, side), batch(side, count=1)
                with torch.no_grad():
                    out = trigger(images, **extras(trigger, 1))
                assert out.shape == images.shape and out.isfinite().all()


def test_files_bring_it_back(tmp_path, subtests: pytest.Subtests) -> None:
    for kind in TRIGGER_KINDS:
        with subtests.test(kind=kind):
            trigger, images = make(kind), batch()
            save_trigger(trigger, tmp_path / "t.safetensors")
            loaded = load_trigger(tmp_path / "t.safetensors")
            with torch.no_grad():
                want, got = (t(images, **extras(t)) for t in (trigger, loaded))
            assert torch.equal(want, got) and loaded.config == trigger.config


@pytest.mark.integration
@pytest.mark.parametrize("kind", TRIGGER_KINDS)
@pytest.mark.parametrize(("side", "channels"), SHAPES)
def test_onnx_and_the_runtime_without_torch(kind: str, side: int, channels: int, tmp_path) -> None:
    trigger, images = make(kind, side, channels), batch(side, channels)
    parity = to_onnx(trigger, images, tmp_path / "t.onnx")
    assert parity.max_abs <= 1e-4
    asked = extras(trigger)
    with torch.no_grad():
        want = to_pixels(
            trigger(torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2) / 255, **asked)
        )
    got = Poisoner(tmp_path / "t.onnx")(
        to_pixels(images), **{name: value.numpy() for name, value in asked.items()}
    )
    assert got.shape == want.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.integration
@pytest.mark.parametrize("kind", TRIGGER_KINDS)
def test_torchscript(kind: str, tmp_path) -> None:
    assert to_torchscript(make(kind), batch(), tmp_path / "t.pt").max_abs <= 1e-4


def test_refuses(subtests: pytest.Subtests) -> None:
    for kind in TRIGGER_KINDS:
        with subtests.test(kind=kind):
            trigger, images = make(kind), batch()
            asked = extras(trigger)
            bad = [images[0], images.double(), images + 1, images[:0]]
            bad += [images[..., :16, :16]] if kind not in ANY_SIZE else []
            for one in bad:
                with pytest.raises(ValueError, match="expected"):
                    trigger(one, **asked)
            for name in asked:
                with pytest.raises(ValueError, match="expected"):
                    trigger(images, **{k: v for k, v in asked.items() if k != name})
