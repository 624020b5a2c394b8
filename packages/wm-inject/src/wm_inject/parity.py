"""Does an exported file compute what its module computes? A comparison at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_FLIPPED = 1e-3  # share of 8-bit values that may land on the other side of a half


class ParityError(RuntimeError):
    """An exported file does not compute what the module computes."""


class Parity(NamedTuple):
    """How far an exported file is from its module, at worst over the batches."""

    max_abs: float  # largest absolute difference
    max_rel: float  # largest of max |a - b| / max |b| over the batches
    batches: tuple[int, ...]  # the batch sizes that were compared


def compare(
    reference: Callable[..., Tensor],
    exported: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    tolerance: float,
    relative: bool,
) -> Parity:
    """Run both on one image and on all; raise if they differ by more than the tolerance."""
    absolute, ratio, batches = 0.0, 0.0, (1, len(inputs["image"]))
    for size in batches:
        rows = {name: value[:size] for name, value in inputs.items()}
        want, got = reference(**rows), exported(**rows)
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ParityError(
                f"at batch size {size} the file gives {got.dtype} {tuple(got.shape)}, "
                f"the module {want.dtype} {tuple(want.shape)}"
            )
        pixels = want.dtype == torch.uint8
        want, got = want.double(), got.double()
        error = (want - got).abs()
        if pixels:
            flipped = float((error > 0).double().mean())
            if error.max() > 1 or flipped > _MAX_FLIPPED:
                raise ParityError(
                    f"at batch size {size} {flipped:.2%} of the 8-bit values differ, "
                    f"by up to {int(error.max())}"
                )
            error, want = error / 255, want / 255
        absolute = max(absolute, float(error.max()))
        ratio = max(ratio, float(error.max() / want.abs().max().clamp_min(1e-12)))
        found = ratio if relative else absolute
        # A comparison with NaN is false, so this refuses NaN as well.
        if not pixels and not found <= tolerance:
            kind = "relative" if relative else "absolute"
            raise ParityError(
                f"at batch size {size} the file differs from the module by {found:.3g} {kind}, "
                f"more than {tolerance:g}"
            )
    return Parity(absolute, ratio, batches)
