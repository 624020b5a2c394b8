"""What a classifier predicts, how often it is right, and how often a trigger turns it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_victim.datasets import ImageSet


def predict(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """The logits of a classifier, in eval mode and float32, without gradients.

    Args:
        model: Images ``(N, C, H, W)`` in [0, 1] -> logits ``(N, K)``. Its mode is put back.
        images: float32 ``(N, C, H, W)`` in [0, 1], on any device.
        batch_size: Images at once.

    Returns:
        float32 ``(N, K)``, on the images' device.

    Raises:
        ValueError: Bad images, a batch size below 1, or outputs that are no logits.
    """
    check_images(images)
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    first = next(model.parameters(), None)
    device = images.device if first is None else first.device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits = [
                model(batch.to(device, memory_format=torch.channels_last)).float()
                for batch in images.split(batch_size)
            ]
    finally:
        for module in training:
            module.training = True
    out = torch.cat(logits)
    if out.ndim != 2:
        raise ValueError(f"expected logits of shape (N, K), got {tuple(out.shape)}")
    return out.to(images.device)


def accuracy(model: nn.Module, data: ImageSet, *, batch_size: int = 512) -> float:
    """The share of images that are predicted as they are labelled.

    Raises:
        ValueError: As `predict`.
    """
    predicted = predict(model, data.images, batch_size=batch_size).argmax(1)
    return (predicted == data.labels).float().mean().item()


def attack_success(
    model: nn.Module, data: ImageSet, trigger: Trigger, *, target: int, batch_size: int = 512
) -> float:
    """The share of triggered images of other classes that are predicted as ``target``.

    Triggered images are rounded to the 8-bit grid first, as a stored file would be.

    Args:
        model: The classifier.
        data: Clean images; those of the target class are left out.
        trigger: What to put into the others.
        target: The class that the attack asks for.
        batch_size: Images at once.

    Raises:
        ValueError: No image of another class, or as `predict`.
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
