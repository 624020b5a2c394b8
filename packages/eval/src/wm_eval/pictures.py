"""Pictures for a report: small lossless files, each named and explained in a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject import save_image, to_pixels

GAINS = (1, 2, 5, 10, 20, 50)


def save_picture(folder: Path, name: str, image: Tensor, caption: str) -> dict[str, Any]:
    """Write one image ``(C, H, W)`` in [0, 1] as ``folder/NAME.png``.

    Returns:
        What a record keeps of it: file name, caption and size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_pixels(image.detach().float().cpu().clamp(0, 1).unsqueeze(0))[0]
    save_image(folder / f"{name}.png", pixels)
    return {"file": f"{name}.png", "caption": caption, "size": list(pixels.shape[:2])}


def residual_gain(change: Tensor) -> int:
    """The largest round gain at which 99 % of a change still fits between black and white."""
    largest = float(change.abs().flatten().float().quantile(0.99))
    return max(gain for gain in GAINS if gain == 1 or gain * largest <= 0.5)


def amplified(change: Tensor, gain: int) -> Tensor:
    """A signed change as a picture, times ``gain``: grey where nothing changed."""
    return (0.5 + gain * change).clamp(0, 1)


@torch.no_grad()
def reversed_picture(folder: Path, name: str, trigger: nn.Module, images: Tensor) -> dict[str, Any]:
    """What a reversed trigger looks like: its mask and pattern, or its mean change, amplified."""
    mask, pattern = getattr(trigger, "mask", None), getattr(trigger, "pattern", None)
    if isinstance(mask, Tensor) and isinstance(pattern, Tensor):
        return save_picture(folder, name, mask * pattern, "mask x pattern")
    change = trigger(images) - images
    gain = residual_gain(change.mean(0))
    caption = f"mean change over {len(images)} images, x {gain}"
    return save_picture(folder, name, amplified(change.mean(0), gain), caption)
