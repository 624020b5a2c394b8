"""Accuracy and attack success of a classifier."""

from __future__ import annotations

import torch
from torch import nn

from wm_inject.core.images import quantize
from wm_inject.core.plan import Trigger
from wm_victim.datasets import ImageSet
from wm_victim.inference import predict


def accuracy(model: nn.Module, data: ImageSet, *, batch_size: int = 512) -> float:
    """The share of images whose prediction is their label (clean accuracy on clean images)."""
    predicted = predict(model, data.images, batch_size=batch_size).argmax(1)
    return (predicted == data.labels).float().mean().item()


def attack_success(
    model: nn.Module, data: ImageSet, trigger: Trigger, *, target: int, batch_size: int = 512
) -> float:
    """The share of triggered images of other classes that are predicted as ``target``.

    ``data`` are clean images. Triggered ones are rounded to the 8-bit grid, as in a stored file.

    Raises:
        ValueError: No image of another class.
    """
    if target < 0:
        raise ValueError(f"expected a target label >= 0, got {target}")
    others = (data.labels != target).nonzero().flatten()
    if not len(others):
        raise ValueError(f"expected images of other classes than the target {target}, got none")
    hits = 0
    for index in others.split(batch_size):
        labels = torch.full_like(data.labels[index], target)
        with torch.no_grad():
            triggered = trigger(data.images[index], ids=data.ids[index], target=labels)
        hits += int((predict(model, quantize(triggered)).argmax(1) == labels).sum())
    return hits / len(others)
