"""Penultimate neurons: what the last linear layer reads, and which of it a trigger excites."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from defense_nc.inversion import frozen
from wm_inject.core.images import check_images
from wm_inject.core.plan import Trigger


def last_linear(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits: ``head`` if there is one, else the last registered.

    Raises:
        ValueError: Not a torch module, or one without a linear layer.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        return head
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected a model with a linear layer, found none")
    return layers[-1]


def activations(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """What the last linear layer reads of each image: ``(N, F)``, without gradients.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        batch_size: Images per pass.

    Raises:
        ValueError: Bad images, no linear layer, or one that does not run once a pass on ``(N, F)``.
    """
    check_images(images)
    layer = last_linear(model)
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    parts = images.split(batch_size)
    try:
        with frozen(model), torch.no_grad():
            for part in parts:
                model(part)
    finally:
        handle.remove()
    if [tuple(values.shape) for values in read] != [(len(p), layer.in_features) for p in parts]:
        raise ValueError("expected a last linear layer that reads (N, F) once a pass, got another")
    return torch.cat(read)


def excitement(model: nn.Module, clean: Tensor, triggered: Tensor) -> Tensor:
    """How much more each penultimate neuron fires when the trigger is there: ``(F,)``.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; given back as it came.
        clean: float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        triggered: The same images with the trigger.

    Returns:
        Mean activation with the trigger minus mean activation without.

    Raises:
        ValueError: As `activations`.

    Source: Neural Cleanse, section V-B. The ranking is by this difference, largest first.
    """
    return activations(model, triggered).mean(0) - activations(model, clean).mean(0)


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
