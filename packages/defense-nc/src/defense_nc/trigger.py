"""The trigger that Neural Cleanse reverses, a mask and a pattern; any trigger on images."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images
from wm_inject.core.plan import Trigger


class InvertedTrigger(nn.Module):
    """A reversed trigger, and itself a Trigger: ``(1 - mask) * images + mask * pattern``.

    Args:
        mask: ``(1, H, W)`` in [0, 1].
        pattern: ``(C, H, W)`` in [0, 1].
        target: The label it was searched for.
        success_rate: Share of other classes' clean images that it sends to the label.
        steps: Steps of the search.
    """

    kind = "nc"
    mask: Tensor
    pattern: Tensor

    def __init__(
        self,
        mask: Tensor,
        pattern: Tensor,
        *,
        target: int = 0,
        success_rate: float = 0.0,
        steps: int = 0,
    ) -> None:
        super().__init__()
        for name, tensor in (("mask", mask), ("pattern", pattern)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 3:
                raise ValueError(f"expected the {name} as a tensor of three dimensions")
        check_images(pattern[None], name="pattern")
        # As an image batch of one channel, the mask has the same rules: float32 in [0, 1].
        height, width = pattern.shape[1:]
        check_images(mask[None], channels=1, size=(height, width), name="mask")
        if not 0 <= success_rate <= 1:
            raise ValueError(f"expected a success_rate in [0, 1], got {success_rate}")
        self.register_buffer("mask", mask)
        self.register_buffer("pattern", pattern)
        self.target, self.success_rate, self.steps = target, success_rate, steps

    @property
    def l1_norm(self) -> float:
        """Sum of the mask, counted once per pixel."""
        return float(self.mask.sum())

    @property
    def config(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        return {
            "shape": list(self.pattern.shape),
            "target": self.target,
            "success_rate": self.success_rate,
            "steps": self.steps,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Triggered images, in [0, 1]; ``ids`` and ``target`` change nothing."""
        channels, height, width = self.pattern.shape
        check_images(images, channels=channels, size=(height, width))
        return compose(images, self.mask, self.pattern).clamp(0, 1)


class Inverted(NamedTuple):
    """The triggers of many labels, and how far each label was searched."""

    triggers: tuple[InvertedTrigger, ...]
    scores: tuple[float, ...]  # norms in pixels, at the effort of the labels searched longest
    race: dict[str, Any] | None  # when each label was stopped, ready for JSON
    starved: tuple[float, ...]  # `GradientCount.share` of each label


def compose(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Put a masked pattern ``(C, H, W)`` into images ``(N, C, H, W)``, in the pixel domain."""
    return images + mask * (pattern - images)


def put_trigger(trigger: Trigger, images: Tensor) -> Tensor:
    """A triggered copy of every image; the trigger itself is not changed or moved.

    Raises:
        ValueError: Not callable, or triggered images that break the image contract.
    """
    if not callable(trigger):
        raise ValueError(f"expected a trigger, got {type(trigger).__name__}")
    if isinstance(trigger, nn.Module):
        trigger = copy.deepcopy(trigger).to(images.device).eval()
    with torch.no_grad():
        ids = torch.arange(len(images), device=images.device)
        triggered = torch.cat([trigger(images[part], ids=part) for part in ids.split(256)])
    check_images(triggered, name="triggered images")
    if triggered.shape != images.shape:
        shapes = f"{tuple(images.shape)}, got {tuple(triggered.shape)}"
        raise ValueError(f"expected triggered images of shape {shapes}")
    return triggered
