from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wm_inject.attacks.badnets import BadNetsTrigger
from wm_inject.attacks.watermark import WatermarkTrigger
from wm_inject.core.images import to_pixels
from wm_inject.stealth import psnr
from wm_inject.watermark import fused_linear
from wm_inject.watermark.fast import fast_trigger
from wm_inject.watermark.fused_linear import packed_weight
from wm_inject.watermark.vit import ViTInjector

SMALL: dict[str, Any] = {
    "image_size": 32,
    "channels": 3,
    "patch_size": 4,
    "width": 64,
    "heads": 2,
    "depth": 2,
    "decoder_depth": 1,
}
CONFIGS = {
    "residual": SMALL,
    "direct": SMALL | {"residual": False},
    "grey and padded": SMALL | {"channels": 1, "image_size": 28},
    "limited": SMALL | {"psnr_floor": 38.0, "max_change": 0.05},
    "odd heads": SMALL | {"width": 36, "heads": 3},
}


def trigger(config: dict[str, Any] = SMALL, strength: float = 1.0) -> WatermarkTrigger:
    """As after training: no weight and no bias is zero, and the change is visible to a test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        injector = ViTInjector(**config)
        for name, parameter in injector.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        torch.nn.init.normal_(injector.head.weight, std=0.01)
    return WatermarkTrigger(injector, strength=strength)


def images(config: dict[str, Any] = SMALL, count: int = 5) -> Tensor:
    shape = (count, config["channels"], config["image_size"], config["image_size"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["oneDNN", "public"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply: with oneDNN's operators where they exist, and without."""
    if request.param == "public":
        monkeypatch.setattr(fused_linear, "packed_weight", lambda weight, rows: None)


@pytest.mark.integration
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_float32_gives_what_the_trigger_gives(config: dict[str, Any], strength: float) -> None:
    slow, x = trigger(config, strength), images(config)
    made = fast_trigger(slow, precision="float32")
    with torch.no_grad():
        assert (made(x) - slow(x)).abs().max() <= 1e-5
    assert made(x).dtype == torch.float32 and not made(x).requires_grad


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_bfloat16_moves_stored_images_by_a_step_or_two(config: dict[str, Any]) -> None:
    slow, x = trigger(config), images(config)
    with torch.no_grad():
        wanted, found = slow(x), fast_trigger(slow, precision="bfloat16")(x)
    steps = (to_pixels(found).astype(int) - to_pixels(wanted).astype(int)).__abs__().max()
    assert steps <= 2
    assert (psnr(found, x) - psnr(wanted, x)).abs().max() <= 0.1
    assert (found - wanted).norm() <= 0.015 * (wanted - x).norm()


def test_many_images_are_done_in_parts_and_alike() -> None:
    made, x = fast_trigger(trigger(), precision="float32"), images(count=70)
    assert torch.allclose(made(x), torch.cat([made(one) for one in x.split(1)]), atol=1e-6)


def test_the_trigger_stays_as_it_was_and_the_form_is_its_own() -> None:
    slow, x = trigger(), images()
    before = {name: value.clone() for name, value in slow.state_dict().items()}
    made = fast_trigger(slow, precision="float32")
    wanted = made(x)
    assert all(torch.equal(value, before[name]) for name, value in slow.state_dict().items())
    with torch.no_grad():
        for parameter in slow.parameters():
            parameter.zero_()
    assert torch.equal(made(x), wanted)


def test_the_output_can_be_trained_on() -> None:
    layer = torch.nn.Conv2d(3, 1, 3)
    layer(fast_trigger(trigger())(images())).sum().backward()
    assert layer.weight.grad is not None


def test_protocol_arguments_play_no_role() -> None:
    made, x = fast_trigger(trigger()), images()
    numbers = torch.arange(len(x))
    assert torch.equal(made(x, ids=numbers, target=numbers), made(x))


def test_weights_that_onednn_cannot_lay_out_stay_as_they_are() -> None:
    assert packed_weight(torch.empty(4, 4, device="meta"), 2) is None
    assert packed_weight(torch.ones(4, 4, dtype=torch.int64), 2) is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected a WatermarkTrigger, got BadNetsTrigger"):
        fast_trigger(BadNetsTrigger(image_size=32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision in bfloat16, float32, got 'int8'"):
        fast_trigger(trigger(), precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a CUDA device for compile, got cpu"):
        fast_trigger(trigger(), compile=True)
    made = fast_trigger(trigger())
    with pytest.raises(ValueError, match=r"shape \(N, 3, 32, 32\)"):
        made(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="images on cpu, got meta"):
        made._check_device(torch.empty(1, 3, 32, 32, device="meta"))
    with pytest.raises(ValueError, match="expected a fast trigger to stay"):
        made.half()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_with_and_without_a_graph(compile: bool) -> None:
    slow, x = trigger(), images(count=40)
    made = fast_trigger(slow, precision="float32", device="cuda", compile=compile)
    with torch.no_grad():
        wanted = slow(x)
    for _ in range(3):  # the graph is recorded in the first calls and replayed after
        assert (made(x.cuda()).cpu() - wanted).abs().max() <= 1e-4
