"""Augmentation of whole batches on the device: one gather for crop and flip, a mask for cutout."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_inject.core.checks import check_choice

PADDING = 4


def augment(
    images: Tensor,
    *,
    mode: Literal["none", "crop", "crop-flip"],
    generator: torch.Generator,
    cutout: int = 0,
) -> Tensor:
    """Shift images by up to 4 pixels each way, over black; mirror half of them; cut out a square.

    Args:
        images: float ``(N, C, H, W)``.
        mode: "none" leaves the images in place; "crop" only shifts; "crop-flip" does both.
        generator: A CPU generator: the draw is the same on every device.
        cutout: Side in pixels of a black square in every image, all of it inside; 0 for none.

    Returns:
        The same shape; in channels-last memory if the mode shifts.
    """
    check_choice("mode", mode, ("none", "crop", "crop-flip"))
    if mode != "none":
        images = _shift(images, flip=mode == "crop-flip", generator=generator)
    return images if cutout == 0 else _cut_out(images, cutout, generator)


def _shift(images: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    device = images.device
    offsets = _move(torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator), device)
    rows = offsets[0] + torch.arange(height, device=device)  # (N, H)
    columns = offsets[1] + torch.arange(width, device=device)  # (N, W)
    if flip:
        flipped = _move(torch.rand((count, 1), generator=generator) < 0.5, device)
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, [PADDING] * 4).permute(0, 2, 3, 1)  # (N, H + 8, W + 8, C)
    rows = rows + torch.arange(count, device=device)[:, None] * padded.shape[1]
    pixel = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # (N, H, W)
    # One list of whole pixels: twice as fast on a CPU as indexing three dimensions at once.
    flat = padded.reshape(-1, channels).index_select(0, pixel.flatten())
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


def _cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    if not 0 < side <= min(height, width):
        raise ValueError(f"expected a cutout of at most {min(height, width)} pixels, got {side}")
    inside = []
    for length in (height, width):
        first = torch.randint(0, length - side + 1, (count, 1), generator=generator)
        offset = torch.arange(length, device=images.device) - _move(first, images.device)
        inside.append((offset >= 0) & (offset < side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (N, 1, H, W)
    return images.masked_fill(hole, 0)


def _move(draws: Tensor, device: torch.device) -> Tensor:
    # Without waiting for the device, which may still run the step before.
    return draws.to(device, non_blocking=True)
