"""Penultimate neurons: what the last linear layer reads, and which of it a trigger excites."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images
from wm_inject.core.plan import Trigger
from wm_victim.activations import penultimate


def excitement(model: nn.Module, clean: Tensor, triggered: Tensor) -> Tensor:
    """How much more each penultimate neuron fires when the trigger is there: ``(F,)``.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; given back as it came.
        clean: float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        triggered: The same images with the trigger.

    Returns:
        Mean activation with the trigger minus mean activation without.

    Raises:
        ValueError: As `wm_victim.activations.penultimate`.

    Source: Neural Cleanse, section V-B. The ranking is by this difference, largest first.
    """
    return penultimate(model, triggered).mean(0) - penultimate(model, clean).mean(0)


def put_trigger(trigger: Trigger, images: Tensor) -> Tensor:
    """A triggered copy of every image; the trigger itself stays where and as it is.

    Args:
        trigger: What to put in.
        images: float32 ``(N, C, H, W)`` in [0, 1], on any device.

    Raises:
        ValueError: Not callable, or triggered images that break the image contract.
    """
    if not callable(trigger):
        raise ValueError(f"expected a trigger, got {type(trigger).__name__}")
    if isinstance(trigger, nn.Module):
        trigger = copy.deepcopy(trigger).to(images.device).eval()
    with torch.no_grad():
        ids = torch.arange(len(images), device=images.device)
        stamped = torch.cat([trigger(images[part], ids=part) for part in ids.split(256)])
    check_images(stamped, name="triggered images")
    if stamped.shape != images.shape:
        raise ValueError(
            f"expected triggered images of shape {tuple(images.shape)}, got {tuple(stamped.shape)}"
        )
    return stamped
