"""Which sizes of images a model runs on, and which it was most likely trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SIZES = (32, 64, 96, 128, 224)
_RARE = (28, 299, 384, 48, 256, 160, 192, 240, 112, 300, 448, 512)
# The most that networks for images of a usual size divide its side by, down to their last maps.
_REDUCTIONS = ((8, 32), (16, 64))
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)
Run = Callable[[Tensor], Any]


def sizes_that_run(
    run: Run, channels: int, *, also: Iterable[int] = (), only: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The usual sizes, or where there are none the rarer ones, that a model runs on; ascending.

    Args:
        run: Images (1, C, H, H) to anything; errors of torch and ``ValueError`` mean that it does
            not run.
        channels: C.
        also: Further sizes to try.
        only: The sizes to try, instead of the usual ones.
    """
    usual = only or {*_SIZES, *also, *((28,) if channels == 1 else ())}
    sizes = tuple(size for size in sorted(usual) if _runs(run, channels, size))
    if sizes or only:
        return sizes
    return tuple(size for size in _RARE if _runs(run, channels, size))[:1]


def _runs(run: Run, channels: int, size: int) -> bool:
    try:
        with torch.no_grad():
            run(torch.full((1, channels, size, size), 0.5))
    except _ERRORS:
        return False
    return True


def likely_size(run: Run, channels: int, sizes: tuple[int, ...]) -> int:
    """Which of the sizes that a model runs on fits how far its convolutions reduce an image."""
    if len(sizes) == 1:
        return sizes[0]
    largest = min(max(sizes), 224)
    with torch.no_grad(), _Maps() as maps:
        run(torch.full((1, channels, largest, largest), 0.5))
    reduction = largest / min((side for side in maps.sides if side > 1), default=largest)
    small = 28 if channels == 1 else 32
    usual = next((size for most, size in _REDUCTIONS if reduction <= most), 224)
    usual = small if usual == 32 else usual
    return min(sizes, key=lambda size: abs(size - usual))


class _Maps(TorchDispatchMode):
    """Notes the side of every map that a convolution gives, in compiled models as well."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor) and y.ndim == 4 and "convolution" in str(func):
            self.sides.append(y.shape[-1])
        return y


def guess_note(size: int, sizes: tuple[int, ...]) -> str:
    """What to say of a size that nobody named."""
    others = ", ".join(str(other) for other in sizes if other != size)
    if not others:
        return f"image size {size}, the only usual one that it runs on"
    return (
        f"image size {size}, a guess: it runs on {others} as well, so give image_size if you know"
    )
