"""What every scan begins with: checked images and labels, a frozen classifier, one device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import device_of, frozen, predict


class ScanInputs(NamedTuple):
    """A frozen classifier and the defender's images, on one device."""

    model: nn.Module
    images: Tensor  # (N, C, H, W), of at least two classes
    labels: Tensor  # int64 (N,): the true classes, or the model's predictions
    num_classes: int


@contextmanager
def open_scan(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Iterator[ScanInputs]:
    """Check a scan's inputs and freeze the classifier until the end of the block.

    With a ``device``, a copy of the classifier is moved there.

    Raises:
        ValueError: Bad images or labels, images of one class only, or a model without logits.
    """
    check_images(images)
    with frozen(model):
        moved = model if device is None else copy.deepcopy(model).to(device)
        images = images.to(device_of(moved))
        logits = predict(moved, images if labels is None else images[:1])
        labels = logits.argmax(1) if labels is None else labels
        check_labels(labels, len(images), num_classes=logits.shape[1])
        if len(labels.unique()) < 2:
            raise ValueError("expected images of at least two classes, got one")
        yield ScanInputs(moved, images, labels.to(images.device), logits.shape[1])
