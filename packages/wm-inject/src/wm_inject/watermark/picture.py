"""The watermark picture: its check, and the one that ships."""

from __future__ import annotations

import torch
from torch import Tensor

from wm_inject.core.images import check_images


def default_watermark(size: int) -> Tensor:
    """The watermark that ships, a ring around a cross: float32 ``(1, size, size)`` of 0 and 1.

    Raises:
        ValueError: ``size`` below 8.
    """
    if size < 8:
        raise ValueError(f"expected a watermark side of at least 8 pixels, got {size}")
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    ring = (radius > 0.62) & (radius < 0.88)
    cross = ((x.abs() < 0.14) | (y.abs() < 0.14)) & (radius < 0.5)
    return (ring | cross).float().unsqueeze(0)


def check_watermark(watermark: Tensor, *, size: int) -> Tensor:
    """Check a watermark picture ``(1, size, size)`` in [0, 1] and return it unchanged.

    Raises:
        ValueError: Another shape, dtype or range.
    """
    if not isinstance(watermark, Tensor) or watermark.shape != (1, size, size):
        got = tuple(watermark.shape) if isinstance(watermark, Tensor) else type(watermark).__name__
        raise ValueError(f"expected a watermark of shape (1, {size}, {size}), got {got}")
    check_images(watermark.unsqueeze(0), name="watermark")
    return watermark
