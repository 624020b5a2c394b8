"""Pictures for a report: small lossless files, each named and explained in a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject import quantize, save_image, to_pixels

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
def watermark_pictures(
    folder: Path, trigger: nn.Module, extractor: nn.Module, watermark: Tensor, images: Tensor
) -> dict[str, Any]:
    """Original, poisoned, amplified residual and extracted watermark of a few images.

    Returns:
        ``{"gain": g, "watermark": picture, "rows": [{"original": picture, ...}, ...]}``.
    """
    poisoned = quantize(trigger(images))
    change = poisoned - quantize(images)
    found = {
        "original": (images, "original"),
        "poisoned": (poisoned, "poisoned, as stored in 8 bits"),
        "residual": (amplified(change, gain := residual_gain(change)), f"change, x {gain}"),
        "extracted": (extractor(poisoned), "watermark read from the poisoned image"),
        "extracted-clean": (extractor(quantize(images)), "watermark read from the original"),
    }
    rows = [
        {
            kind: save_picture(folder, f"watermark-{i}-{kind}", batch[i], caption)
            for kind, (batch, caption) in found.items()
        }
        for i in range(len(images))
    ]
    mark = save_picture(folder, "watermark", watermark, "the watermark")
    return {"gain": gain, "watermark": mark, "rows": rows}


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
