"""Does an exported file compute what its module computes? A comparison at two batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_FLIPPED = 1e-3  # share of 8-bit values that may land on the other side of a half
_EXACT = 1e-3  # tolerances up to here are about rounding; above, about a lower precision

Run = Callable[..., Sequence[Tensor]]


class ParityError(RuntimeError):
    """An exported file does not compute what the module computes."""


class Parity(NamedTuple):
    """How far an exported file is from its module, at worst over the batches and outputs."""

    max_abs: float  # largest absolute difference
    max_rel: float  # largest of max |a - b| / max |b| over the batches
    batches: tuple[int, ...]  # the batch sizes that were compared


def compare(
    reference: Run,
    exported: Run,
    inputs: Mapping[str, Tensor],
    tolerance: float,
    relative: bool,
) -> Parity:
    """Run both on one image and on all; raise if they differ by more than the tolerance.

    Of 8-bit outputs, one value in a thousand may differ by one. A tolerance above a thousandth
    (a lower precision) allows all of them to differ by as many steps as it has, and at least one.

    Args:
        inputs: Tensors ``(N, ...)`` by name; one is called "image".
        tolerance: Largest difference to accept, in units of the output.
        relative: Measure it as max |a - b| / max |b|.

    Raises:
        ParityError: The file gives other shapes, types or values.
    """
    absolute, ratio, batches = 0.0, 0.0, (1, len(inputs["image"]))
    for size in batches:
        rows = {name: value[:size] for name, value in inputs.items()}
        for want, got in zip(reference(**rows), exported(**rows), strict=True):
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ParityError(
                    f"at batch size {size} the file gives {got.dtype} {tuple(got.shape)}, "
                    f"the module {want.dtype} {tuple(want.shape)}"
                )
            if want.dtype == torch.uint8:
                error, scale = _steps(want, got, size, tolerance) / 255, 1.0
            else:
                error = float((want.double() - got.double()).abs().max())
                scale = max(float(want.abs().max()), 1e-12)
            absolute, ratio = max(absolute, error), max(ratio, error / scale)
            difference = error / scale if relative else error
            # A comparison with NaN is false, so this refuses NaN as well.
            if want.dtype != torch.uint8 and not difference <= tolerance:
                kind = "relative" if relative else "absolute"
                raise ParityError(
                    f"at batch size {size} the file differs from the module by {difference:.3g} "
                    f"{kind}, more than {tolerance:g}"
                )
    return Parity(absolute, ratio, batches)


def _steps(want: Tensor, got: Tensor, size: int, tolerance: float) -> int:
    """The largest difference of two 8-bit outputs, if it is one that may be."""
    error = (want.int() - got.int()).abs()
    worst, flipped = int(error.max()), float((error > 0).double().mean())
    lower = tolerance > _EXACT
    allowed = max(1, math.ceil(tolerance * 255)) if lower else 1
    if worst > allowed or (flipped > _MAX_FLIPPED and not lower):
        raise ParityError(
            f"at batch size {size} {flipped:.2%} of the 8-bit values differ, by up to {worst}"
        )
    return worst
