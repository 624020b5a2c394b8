"""Accuracy and attack success of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wm_inject.core.images import quantize
from wm_inject.core.plan import Trigger
from wm_victim.datasets import ImageSet
from wm_victim.inference import predict

_BATCH = 256  # images that a trigger gets at once


def accuracy(model: nn.Module, data: ImageSet, *, batch_size: int = 512) -> float:
    """The share of images whose prediction is their label (clean accuracy on clean images)."""
    predicted = predict(model, data.images, batch_size=batch_size).argmax(1)
    return (predicted == data.labels).float().mean().item()


def triggered_images(trigger: Trigger, data: ImageSet, *, target: int | None = None) -> Tensor:
    """Every image with the trigger, as a file would keep it: on the 8-bit grid."""
    targets = None if target is None else torch.full_like(data.labels, target)
    parts = torch.arange(len(data), device=data.images.device).split(_BATCH)
    rows = [(data.images[i], data.ids[i], None if targets is None else targets[i]) for i in parts]
    with torch.no_grad():
        return torch.cat([quantize(trigger(x, ids=ids, target=to)) for x, ids, to in rows])


def attack_logits(
    model: nn.Module, data: ImageSet, trigger: Trigger, *, target: int, batch_size: int = 512
) -> Tensor:
    """The logits of triggered images of other classes than ``target``.

    Raises:
        ValueError: No image of another class.
    """
    if target < 0:
        raise ValueError(f"expected a target label >= 0, got {target}")
    others = data.labels != target
    if not bool(others.any()):
        raise ValueError(f"expected images of other classes than the target {target}, got none")
    triggered = triggered_images(trigger, data.subset(others), target=target)
    return predict(model, triggered, batch_size=batch_size)


def attack_success(
    model: nn.Module, data: ImageSet, trigger: Trigger, *, target: int, batch_size: int = 512
) -> float:
    """The share of triggered images of other classes that are predicted as ``target``.

    ``data`` are clean images. Triggered ones are rounded to the 8-bit grid, as in a stored file.

    Raises:
        ValueError: No image of another class.
    """
    logits = attack_logits(model, data, trigger, target=target, batch_size=batch_size)
    return int((logits.argmax(1) == target).sum()) / len(logits)
