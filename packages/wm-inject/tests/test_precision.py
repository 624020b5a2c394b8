"""The automatic precision follows the hardware."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wm_inject.core.precision import onednn_bfloat16, resolve_precision


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
