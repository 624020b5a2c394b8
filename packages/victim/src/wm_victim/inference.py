"""Run a classifier without changing it: frozen, on its device, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images

# Of the images in a pass: eight of 224 pixels on a CPU. The maps of more are so large that the
# system takes their memory back after every layer, which slows every pass.
_VALUES = 5 * 2**18
_VALUES_ON_A_GPU = 2**25


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode without parameter gradients, then restore both.

    Raises:
        ValueError: Not a torch module.
    """
    _check_module(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer is; the CPU for a model without any.

    Raises:
        ValueError: Not a torch module.
    """
    _check_module(model)
    first = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    return torch.device("cpu") if first is None else first.device


def images_a_pass(images: Tensor, device: torch.device, *, most: int) -> int:
    """How many images to give a model at once, so that memory is bounded at any size of image.

    Args:
        images: ``(N, C, H, W)``.
        device: Of the model.
        most: However small they are, >= 1.
    """
    room = _VALUES if device.type == "cpu" else _VALUES_ON_A_GPU
    return max(1, min(most, room // max(1, math.prod(images.shape[1:]))))


def predict(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Logits in eval mode, without gradients: float32 ``(N, K)`` on the images' device.

    Of large images fewer are taken at once than ``batch_size`` (`images_a_pass`).

    Raises:
        ValueError: Bad images, a batch size below 1, or outputs that are not finite logits of at
            least two classes.
    """
    check_images(images)
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    device = device_of(model)
    at_once = images_a_pass(images, device, most=batch_size)
    with frozen(model), torch.no_grad():
        parts = [
            # A copy, since some models normalise their images in place.
            _tensor(model(batch.to(device, memory_format=torch.channels_last, copy=True))).float()
            for batch in images.split(at_once)
        ]
    logits = torch.cat(parts)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise ValueError(f"expected logits of shape (N, K), K >= 2, got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("expected finite logits, got NaN or infinity")
    return logits.to(images.device)


def _tensor(outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected logits (N, K) as one tensor from the model, got {type(outputs).__name__}: "
            "give a module that returns the logits alone"
        )
    return outputs


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
