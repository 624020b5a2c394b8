"""Running a classifier leaves it alone; the precision follows the hardware."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from wm_inject.core.precision import onednn_bfloat16, resolve_precision
from wm_victim.inference import frozen, predict

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def linear(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, classes))


def test_a_frozen_model_is_in_eval_mode_without_gradients_and_comes_back() -> None:
    model = linear(3)
    model[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, False]


def test_logits_are_of_two_classes_or_more() -> None:
    assert predict(linear(2), IMAGES).shape == (3, 2)
    with pytest.raises(ValueError, match="K >= 2"):
        predict(linear(1), IMAGES)


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_the_automatic_precision_is_what_is_fast(
    monkeypatch: pytest.MonkeyPatch, probe: str
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr("wm_inject.core.precision.onednn_bfloat16", lambda: True)
    assert resolve_precision("auto", "cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, probe, lambda: True)
    assert resolve_precision("auto", "cpu") == torch.bfloat16
    monkeypatch.setattr("wm_inject.core.precision.onednn_bfloat16", lambda: False)
    assert resolve_precision("auto", "cpu") == torch.float32
    monkeypatch.setattr("wm_inject.core.precision.onednn_bfloat16", lambda: True)
    monkeypatch.delattr(torch.cpu, probe)
    assert resolve_precision("auto", "cpu") == torch.float32
    assert resolve_precision("float32", "cpu") == torch.float32
    assert resolve_precision("bfloat16", "cpu") == torch.bfloat16


def test_on_a_gpu_emulation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", "cuda") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision("auto", torch.device("cuda")) == torch.bfloat16


def test_onednn_is_asked_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        for probe in (True, False, None):
            ops = SimpleNamespace()
            if probe is not None:
                ops._is_mkldnn_bf16_supported = lambda probe=probe: probe
            monkeypatch.setattr(torch.ops, "mkldnn", ops)
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda there=there: there)
            assert onednn_bfloat16() is (there and probe is True)


def test_a_model_that_changes_its_input_changes_a_copy() -> None:
    class InPlace(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mul_(2).flatten(1)

    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    predict(InPlace(), images)
    assert torch.equal(images, before)
