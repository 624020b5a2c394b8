"""Checks that every mitigation begins with."""

from __future__ import annotations

from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import device_of, predict


def check_repair(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Check the inputs of a mitigation, and return the number of classes.

    Raises:
        ValueError: Not a torch module, bad images or labels, fewer than two images, outputs that
            are not finite logits, or no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch module as the model, got {type(model).__name__}")
    check_images(images)
    check_labels(labels, len(images))
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images to repair with, got {len(images)}")
    trainable(model)
    num_classes = predict(model, images[:1].to(device_of(model))).shape[1]
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
