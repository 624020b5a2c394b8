"""What every scan begins with: checked images and labels, a frozen classifier, one device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import device_of, frozen, predict
from wm_victim.logits import Logits, squash_of

_SAMPLE = 64  # images that the scale of the logits is read from
_FEWEST = 8  # for less nothing is said of it
# Median distance of the two highest logits. A classifier below is unsure of its own images; one
# above has losses that are 0 or as good as linear. In between nothing is changed.
_DISTANCES = (1.0, 200.0)
_USUAL = 10.0  # what it is brought to otherwise


class ScanInputs(NamedTuple):
    """A frozen classifier and the defender's images, on one device."""

    model: nn.Module  # gives logits at a usual scale
    images: Tensor  # (N, C, H, W), of at least two classes
    labels: Tensor  # int64 (N,): the true classes, or the model's predictions
    num_classes: int
    notes: tuple[str, ...] = ()  # what was done to the classifier's outputs


@contextmanager
def open_scan(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Iterator[ScanInputs]:
    """Check a scan's inputs and freeze the classifier until the end of the block.

    With a ``device``, a copy of the classifier is moved there. The images stay as they are, also
    where the classifier changes them in place, and the block can differentiate, also inside
    `torch.inference_mode`.

    Raises:
        ValueError: Bad images or labels, images of one class only, or a model without logits.
    """
    device_of(model)  # refuses what is no module
    check_images(images)
    with torch.inference_mode(False):
        if any(t.is_inference() for t in itertools.chain(model.parameters(), model.buffers())):
            model = copy.deepcopy(model)
        images = images.clone() if images.is_inference() else images
        labels = labels if labels is None else labels.clone()
        with frozen(model):
            moved = model if device is None else copy.deepcopy(model).to(device)
            images = images.to(device_of(moved))
            logits = predict(moved, images if labels is None else images[:_SAMPLE])
            labels = logits.argmax(1) if labels is None else labels
            check_labels(labels, len(images), num_classes=logits.shape[1])
            if len(labels.unique()) < 2:
                raise ValueError("expected images of at least two classes, got one")
            searched, notes = as_logits(moved, images, logits[:_SAMPLE])
            yield ScanInputs(searched, images, labels.to(images.device), logits.shape[1], notes)


def as_logits(
    model: nn.Module, images: Tensor, outputs: Tensor
) -> tuple[nn.Module, tuple[str, ...]]:
    """A classifier whose logits lie at a usual scale, and remarks; the same one if they do.

    Args:
        outputs: Of the first images ``(M, K)``.
    """
    squash = squash_of(outputs) if len(outputs) >= _FEWEST else None
    read = Logits(model, squash)
    top = read.convert(outputs).topk(2).values
    distance = float((top[:, 0] - top[:, 1]).median()) if len(outputs) >= _FEWEST else _USUAL
    usual = distance == 0 or _DISTANCES[0] <= distance <= _DISTANCES[1]
    read.factor = 1.0 if usual else _USUAL / distance
    read.copy = _changes_images(model, images)
    notes = []
    if squash is not None:
        notes.append(f"outputs that look like {squash} were turned to logits")
    if not usual:
        notes.append(f"logits were multiplied by {read.factor:.3g} for the search")
    if squash is None and usual and not read.copy:
        return model, ()
    return read.eval(), tuple(notes)


def _changes_images(model: nn.Module, images: Tensor) -> bool:
    """Whether a model writes into the images that it is given."""
    probe = images[:2].clone()
    with torch.no_grad():
        model(probe)
    return not torch.equal(probe, images[:2])
