"""Augmentation of whole batches on the device: one gather for crop and flip together."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4


def augment(
    images: Tensor, *, mode: Literal["none", "crop", "crop-flip"], generator: torch.Generator
) -> Tensor:
    """Shift every image by up to 4 pixels each way, over black, and mirror half of them.

    Args:
        images: float ``(N, C, H, W)``.
        mode: "none" returns the images as they are; "crop" only shifts; "crop-flip" does both.
        generator: A CPU generator: the draw is the same on every device.

    Returns:
        The same shape, in channels-last memory.

    Raises:
        ValueError: Another mode.
    """
    if mode == "none":
        return images
    if mode not in ("crop", "crop-flip"):
        raise ValueError(f"expected a mode in none, crop, crop-flip, got {mode!r}")
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)  # (N, H)
    columns = offsets[1] + torch.arange(width)  # (N, W)
    if mode == "crop-flip":
        flipped = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, [PADDING] * 4).permute(0, 2, 3, 1)  # (N, H + 8, W + 8, C)
    rows = rows + torch.arange(count)[:, None] * padded.shape[1]
    pixel = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # (N, H, W)
    # One list of whole pixels: twice as fast on a CPU as indexing three dimensions at once.
    flat = padded.reshape(-1, channels).index_select(0, pixel.flatten().to(images.device))
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
