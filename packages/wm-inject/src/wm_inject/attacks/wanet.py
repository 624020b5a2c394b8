"""WaNet: a smooth, fixed, barely visible warp; and its noise mode for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.cotraining import CrossTriggerHook
from wm_inject.attacks.definition import Attack, Length
from wm_inject.core.images import check_side
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.warps import sample, to_every_pixel, unmoved


class WaNetTrigger(nn.Module):
    """Warp every image along one smooth random field.

    Args:
        grid: Side k of the control grid that the field is interpolated from, at least 2.
        strength: Scale s of the field. A pixel moves by about s / 2 whatever the size; s H / 32
            keeps the look of 32 pixels.

    Source: Nguyen & Tran, "WaNet" (ICLR 2021), with the released code's
    ``align_corners=True`` throughout and its grid_rescale of 1.
    """

    kind = "wanet"
    extra_repr = show_config
    field: Tensor
    identity: Tensor

    def __init__(
        self, *, image_size: int, grid: int = 4, strength: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        check_side(image_size, at_least=2)
        if not 2 <= grid <= image_size:
            raise ValueError(f"expected a control grid of 2 .. {image_size} points, got {grid}")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"expected strength >= 0, got {strength}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "grid": grid,
            "strength": float(strength),
            "seed": seed,
        }
        generator = torch.Generator().manual_seed(seed)
        control = torch.rand(1, 2, grid, grid, generator=generator) * 2 - 1
        control = control / control.abs().mean()
        size = (image_size, image_size)
        self.register_buffer("field", to_every_pixel(control, size).contiguous())  # (1, H, W, 2)
        self.register_buffer("identity", unmoved(size), persistent=False)
        self.strength = float(strength)

    @property
    def sampling(self) -> Tensor:
        """Where each output pixel is read from: ``(1, H, W, 2)`` as (x, y) in [-1, 1]."""
        shift = self.strength * self.field / self.config["image_size"]
        return (self.identity + shift).clamp(-1, 1)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Warp the images."""
        check_batch(images, self.config)
        return sample(images, self.sampling.expand(images.shape[0], -1, -1, -1))

    def noise_hook(
        self, plan: PoisonPlan, *, num_classes: int, cross_ratio: float = 2.0
    ) -> CrossTriggerHook:
        """WaNet's part in training, with its noise mode: see `CrossTriggerHook`."""
        return CrossTriggerHook(self, plan, num_classes, cross_ratio)

    def cross(self, images: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The images at ``rows``, warped by the field plus U(-1, 1) / H per pixel (noise mode)."""
        side = self.config["image_size"]
        noise = torch.rand(len(rows), side, side, 2, generator=generator) * 2 - 1
        grid = self.sampling + noise.to(images.device) / side
        return sample(images[rows], grid.clamp(-1, 1))


def _hook(
    attack: Attack, trigger: WaNetTrigger, plan: PoisonPlan, num_classes: int, length: Length | None
) -> CrossTriggerHook:
    return trigger.noise_hook(plan, num_classes=num_classes)


ATTACK = Attack("wanet", "WaNet", WaNetTrigger, mode="per_batch", co_training=_hook)
