"""Which precision is fast here: what processors and oneDNN say of bfloat16."""

from __future__ import annotations

import torch


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype:
    """`torch.float32` or `torch.bfloat16`; "auto" is bfloat16 where that is fast."""
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(map(cpu_has, units)) and onednn_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has(probe: str) -> bool:
    """What a private function of `torch.cpu` says of the processor; "no" where there is none."""
    # torch has no public function for this before 2.12.
    return bool(getattr(torch.cpu, probe, lambda: False)())


def onednn_bfloat16() -> bool:
    """Whether oneDNN convolves in bfloat16 here; its variable ONEDNN_MAX_CPU_ISA counts."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and bool(probe())
