"""What the baselines share: their SGD settings and one loop that counts optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.mitigator import batches, trainable
from wm_inject.core.progress import progress as show_progress
from wm_victim.augment import augment

Schedule = Literal["constant", "cosine", "drop"]
Augmentation = Literal["none", "crop", "crop-flip"]
Closure = Callable[[], Tensor]
Settings = TypeVar("Settings")

_LOGGED = 10  # a loss curve becomes this many averages


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """How a classifier is trained. Every baseline has these fields among its settings.

    Args:
        steps: Optimiser steps.
        batch_size: Images per step, at least 2.
        lr: Learning rate at the start.
        momentum: In [0, 1).
        weight_decay: At least 0.
        nesterov: Nesterov's form of the momentum.
        schedule: "constant"; "cosine", down to 0 after the last step; or "drop", a tenth of the
            rate after the first tenth of the steps.
        augmentation: "none"; "crop", shifts of up to 4 pixels; or "crop-flip", mirrored as well.
        label_smoothing: Share of the wanted answer that is spread over all classes, in [0, 1).

    Raises:
        ValueError: A value outside its range.
    """

    steps: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: Schedule = "constant"
    augmentation: Augmentation = "none"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError(
                f"expected steps >= 1 and batch_size >= 2, got {self.steps}, {self.batch_size}"
            )
        if not 0 < self.lr < math.inf or not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(
                "expected lr > 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {self.lr}, {self.momentum}, {self.weight_decay}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("expected a momentum above 0 for nesterov, got 0")
        if self.schedule not in ("constant", "cosine", "drop"):
            raise ValueError(
                f"expected a schedule in constant, cosine, drop, got {self.schedule!r}"
            )
        if self.augmentation not in ("none", "crop", "crop-flip"):
            raise ValueError(
                f"expected an augmentation in none, crop, crop-flip, got {self.augmentation!r}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"expected label_smoothing in [0, 1), got {self.label_smoothing}")


def sgd_of(settings: Any, **changes: Any) -> Sgd:
    """The SGD settings among those of a baseline, with some of them changed.

    Raises:
        ValueError: A value outside its range.
    """
    values = {field.name: getattr(settings, field.name) for field in fields(Sgd)}
    return Sgd(**{**values, **changes})


def preset_of(
    kind: Callable[..., Settings],
    presets: dict[str, dict[str, Any]],
    name: str,
    changes: dict[str, Any],
) -> Settings:
    """The settings of this name, with some of them changed.

    Raises:
        ValueError: No such preset, or a value outside its range.
    """
    if name not in presets:
        raise ValueError(f"expected a preset in {', '.join(presets)}, got {name!r}")
    return kind(**{**presets[name], **changes})


def learning_rate(sgd: Sgd, step: int) -> float:
    """The rate of a step, counted from 0."""
    if sgd.schedule == "cosine":
        return sgd.lr * 0.5 * (1 + math.cos(math.pi * step / sgd.steps))
    if sgd.schedule == "drop" and step >= sgd.steps / 10:
        return sgd.lr / 10
    return sgd.lr


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    sgd: Sgd,
    seed: int,
    rows: Iterator[Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    update: Callable[[torch.optim.Optimizer, Closure], Tensor] | None = None,
    desc: str = "fine-tuning",
    progress: bool = False,
) -> list[float]:
    """Train a classifier in place, in train mode, and leave it in eval mode.

    Args:
        model: What to train; parameters without gradients stay as they are.
        images: float32 ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``.
        sgd: Settings.
        seed: Seeds the order of the images, augmentation and dropout.
        rows: The rows of each step's batch; shuffled passes over all images if None.
        loss: A batch of images and labels to a scalar; cross-entropy of the model's logits if None.
        update: One step with an optimiser, by a closure that clears the gradients, computes the
            loss and its gradients, and returns it; the ordinary one if None.
        desc: What the progress bar says.
        progress: Show how far it is.

    Returns:
        The average loss of each tenth of the steps.

    Raises:
        RuntimeError: The loss became NaN or infinite.
    """
    parameters = trainable(model)
    device = parameters[0].device
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.SGD(
        parameters,
        lr=sgd.lr,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
        nesterov=sgd.nesterov,
    )
    loss = cross_entropy(model, sgd) if loss is None else loss
    update = plain_step if update is None else update
    generator = torch.Generator().manual_seed(seed)
    if rows is None:
        rows = batches(len(images), sgd.batch_size, sgd.steps, generator)
    # A stream of its own: augmented or not, the images come in the same order.
    drawn = torch.Generator().manual_seed(seed + 1)
    losses: list[Tensor] = []
    # Dropout draws from the global generators: seeded here, and given back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        bar = show_progress(range(sgd.steps), desc=desc, enabled=progress)
        for step, index in zip(bar, rows, strict=True):
            index = index.to(device)
            batch = augment(images[index], mode=sgd.augmentation, generator=drawn)
            closure = _closure(optimizer, loss, batch, labels[index])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(sgd, step)
            losses.append(update(optimizer, closure).detach())
    model.eval()
    return _averages(torch.stack(losses), sgd.lr)


def cross_entropy(model: nn.Module, sgd: Sgd) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of plain fine-tuning: a batch of images and labels to a scalar."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=sgd.label_smoothing)

    return loss


def plain_step(optimizer: torch.optim.Optimizer, closure: Closure) -> Tensor:
    """The ordinary step: gradients where the model is, then the optimiser."""
    loss = closure()
    optimizer.step()
    return loss


def _closure(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> Closure:
    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            value = loss(images, labels)
            value.backward()
        return value

    return closure


def _averages(losses: Tensor, lr: float) -> list[float]:
    if not bool(torch.isfinite(losses).all()):
        first = int((~torch.isfinite(losses)).nonzero()[0])
        raise RuntimeError(
            f"the loss became {float(losses[first])} in step {first + 1}: "
            f"try a lower learning rate than {lr}"
        )
    return [float(part.double().mean()) for part in losses.tensor_split(min(_LOGGED, len(losses)))]
