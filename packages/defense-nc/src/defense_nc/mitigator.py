"""What mitigations share: checks, trainable parameters, batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import frozen, predict


def check_repair(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Check what every mitigation is given, and return the number of classes.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``, with trainable parameters.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
        labels: int64 ``(N,)``, each in 0 .. K - 1.

    Returns:
        K, the number of the model's classes.

    Raises:
        ValueError: Not a torch module, bad images or labels, fewer than two images, an answer that
            is not a matrix of finite logits, or no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    check_images(images)
    check_labels(labels, len(images))
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images to repair with, got {len(images)}")
    device = trainable(model)[0].device
    with frozen(model):
        num_classes = predict(model, images[:1].to(device)).shape[1]
    check_labels(labels, len(images), num_classes=num_classes)
    return num_classes


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a mitigation may change: those that require gradients.

    Raises:
        ValueError: There is none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with trainable parameters, found none")
    return parameters


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Exactly ``steps`` batches of row numbers: every row once before any row again.

    Args:
        count: How many rows there are, at least 2.
        size: Rows per batch, at least 2; all of them if there are fewer. The last batch of a pass
            is as short as it comes out, but never a single row: that one is left for later passes,
            since batch normalisation cannot train on it.
        steps: How many batches, at least 0.
        generator: Draws a new order for each pass.

    Raises:
        ValueError: A number below its least.
    """
    if count < 2 or size < 2 or steps < 0:
        raise ValueError(
            f"expected count >= 2, size >= 2 and steps >= 0, got {count}, {size}, {steps}"
        )
    return _passes(count, size, steps, generator)


def _passes(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    left = steps
    while left > 0:
        parts = torch.randperm(count, generator=generator).split(size)
        if len(parts[-1]) == 1:
            parts = parts[:-1]
        yield from parts[:left]
        left -= len(parts)
