"""BadNets: a small square in the bottom right corner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack
from wm_inject.core.images import check_side


class BadNetsTrigger(nn.Module):
    """Overwrite a square near the bottom right corner with one grey value.

    Args:
        size: Side of the patch in pixels; ``round(3 H / 32)`` if None.
        margin: Pixels between the patch and the edges.
        value: What every channel of the patch becomes, in [0, 1]; 1 is white.

    Source: Gu et al., "BadNets" (2017), with BackdoorBench's size and position at 32 pixels.
    """

    kind = "badnets"
    extra_repr = show_config
    mask: Tensor

    def __init__(
        self, *, image_size: int, size: int | None = None, margin: int = 0, value: float = 1.0
    ) -> None:
        super().__init__()
        check_side(image_size)
        size = max(1, round(3 * image_size / 32)) if size is None else size
        if size < 1 or margin < 0 or size + margin > image_size:
            raise ValueError(
                f"expected a patch inside {image_size} pixels, got size {size}, margin {margin}"
            )
        if not 0 <= value <= 1:
            raise ValueError(f"expected a patch value in [0, 1], got {value}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "size": size,
            "margin": margin,
            "value": float(value),
        }
        end = image_size - margin
        mask = torch.zeros(1, image_size, image_size, dtype=torch.bool)
        mask[:, end - size : end, end - size : end] = True
        self.register_buffer("mask", mask)
        self.value = float(value)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Stamp the patch."""
        check_batch(images, self.config)
        return images.masked_fill(self.mask, self.value)


ATTACK = Attack("badnets", "BadNets", BadNetsTrigger)
