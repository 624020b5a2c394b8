"""Smooth warps of images: a coarse grid of shifts, interpolated to every pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def to_every_pixel(control: Tensor, size: tuple[int, int]) -> Tensor:
    """The shifts ``(1, H, W, 2)`` of every pixel, from those of a control grid ``(1, 2, k, k)``."""
    field = F.interpolate(control, size=size, mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1)


def unmoved(size: tuple[int, int]) -> Tensor:
    """Where the pixels of an image are: ``(1, H, W, 2)`` as (x, y) in [-1, 1], edge to edge."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    return torch.stack([x, y], dim=2)[None]


def sample(images: Tensor, places: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` read at places ``(N, H, W, 2)``, as (x, y) in [-1, 1]."""
    warped = F.grid_sample(images, places, padding_mode="zeros", align_corners=True)
    return warped.clamp(0, 1)
