"""Faster gradients of a convolution's weights where its maps are small, on CPUs with AMX.

oneDNN's times fit sums over the pixels of a row in tiles of 32, of which a map 4 pixels wide fills
an eighth. Images side by side, a zero column between two, fill one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wm_inject.core.precision import cpu_has, onednn_bfloat16

_TILE = 32  # bfloat16 numbers that AMX sums in one go
_WIDEST = 8  # pixels: laying out wider maps costs more than it saves
_CHANNELS = 64  # fewer do not pay for it either


def amx() -> bool:
    """Whether oneDNN may multiply bfloat16 in tiles here."""
    return cpu_has("_is_amx_tile_supported") and onednn_bfloat16()


class SideBySideGradients(TorchFunctionMode):
    """While it is on, convolutions of small maps are computed by `convolve`, others as ever.

    Of 3 x 3 kernels, stride 1, padding 1, without bias; maps up to 8 pixels wide of at least 64
    channels. For use inside autocast to bfloat16.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ``F.conv2d(images, weight, None, 1, 1, 1, 1)``."""
        if func is F.conv2d and not kwargs and len(args) == 7 and _fits(*args):
            return convolve(args[0], args[1])
        return func(*args, **(kwargs or {}))


def _fits(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    if bias is not None or groups != 1 or weight.shape[2:] != (3, 3) or not weight.requires_grad:
        return False
    if not torch.is_grad_enabled() or images.ndim != 4 or images.shape[3] > _WIDEST:
        return False
    all_one = all(x in ((1, 1), 1) for x in (stride, padding, dilation))
    return all_one and min(weight.shape[:2]) >= _CHANNELS


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 convolution, stride 1, padding 1, in bfloat16.

    Args:
        images: ``(N, C, H, W)``.
        weight: ``(C', C, 3, 3)``.

    Returns:
        bfloat16 ``(N, C', H, W)``.
    """
    low = torch.bfloat16
    y: Tensor = _Convolution.apply(images.to(low), weight.to(low))
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        of_images, of_weight = ctx.needs_input_grad
        grad = grads[0]
        return (
            _backward(grad, images, weight, (True, False))[0] if of_images else None,
            _backward(_in_rows(grad), _in_rows(images), weight, (False, True))[1]
            if of_weight
            else None,
        )


def _backward(grad: Tensor, images: Tensor, weight: Tensor, which: tuple[bool, bool]) -> Any:
    ones = [1, 1]
    return torch.ops.aten.convolution_backward(
        grad, images, weight, None, ones, ones, ones, False, [0, 0], 1, [*which, False]
    )


def _in_rows(maps: Tensor) -> Tensor:
    """``(N, C, H, W)`` to ``(N / k, C, H, k * (W + 1))``; zeros stand for the images that lack."""
    count, channels, height, width = maps.shape
    step = width + 1
    side = -(-_TILE // step)
    rows = -(-count // side)
    wide = maps.new_zeros(rows, height, side, step, channels)
    pixels = maps.permute(0, 2, 3, 1)
    full = count // side
    wide[:full, :, :, :width] = (
        pixels[: full * side].reshape(full, side, height, width, channels).transpose(1, 2)
    )
    if full < rows:
        wide[full, :, : count - full * side, :width] = pixels[full * side :].transpose(0, 1)
    return wide.view(rows, height, side * step, channels).permute(0, 3, 1, 2)
