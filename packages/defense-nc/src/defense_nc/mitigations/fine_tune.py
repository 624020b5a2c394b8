"""Fine-tuning by SGD, counted in optimiser steps: the loop under most mitigations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import training_batches
from defense_nc.mitigations.common import trainable
from wm_inject.core.checks import check_choice
from wm_inject.core.presets import preset_of
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import seeded
from wm_victim.augment import augment

Closure = Callable[[], Tensor]
T = TypeVar("T")

_AVERAGES = 10  # a loss curve is logged as this many averages


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """How a classifier is fine-tuned.

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
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "drop"] = "cosine"
    augmentation: Literal["none", "crop", "crop-flip"] = "none"
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
        check_choice("a schedule", self.schedule, ("constant", "cosine", "drop"))
        check_choice("an augmentation", self.augmentation, ("none", "crop", "crop-flip"))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"expected label_smoothing in [0, 1), got {self.label_smoothing}")


_SGD = tuple(field.name for field in fields(Sgd))


def sgd_preset(
    cls: type[T], presets: Mapping[str, Mapping[str, Any]], name: str, /, **changes: Any
) -> T:
    """As `preset_of`, for settings with a field ``sgd``: names of `Sgd`'s fields change that."""
    check_choice("a preset", name, presets)
    values = {**presets[name], **changes}
    inner = {key: values.pop(key) for key in _SGD if key in values}
    sgd = values.pop("sgd", cls().sgd)  # type: ignore[attr-defined]
    return preset_of(cls, {name: {"sgd": replace(sgd, **inner)}}, name, **values)


def learning_rate(sgd: Sgd, step: int) -> float:
    """The rate of a step, counted from 0."""
    if sgd.schedule == "cosine":
        return sgd.lr * 0.5 * (1 + math.cos(math.pi * step / sgd.steps))
    if sgd.schedule == "drop" and step >= sgd.steps / 10:
        return sgd.lr / 10
    return sgd.lr


def fine_tune(
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
        rows: Row numbers of each step's batch; shuffled passes over all images if None.
        loss: A batch of images and labels to a scalar; cross-entropy of the model's logits if None.
        update: One step with an optimiser and a closure that computes the loss and its gradients;
            plain SGD if None.

    Returns:
        The average loss of each tenth of the steps.

    Raises:
        DivergedError: The loss became NaN or infinite.
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
        rows = training_batches(len(images), sgd.batch_size, sgd.steps, generator)
    # A stream of its own: augmented or not, the images come in the same order.
    augmentation = torch.Generator().manual_seed(seed + 1)
    losses: list[Tensor] = []
    with seeded(seed, device):  # dropout draws from the global generators
        model.train()
        bar = show_progress(range(sgd.steps), desc=desc, enabled=progress)
        for step, index in zip(bar, rows, strict=True):
            index = index.to(device)
            batch = augment(images[index], mode=sgd.augmentation, generator=augmentation)
            closure = _closure(optimizer, loss, batch, labels[index])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(sgd, step)
            losses.append(update(optimizer, closure).detach())
    model.eval()
    return _averages(torch.stack(losses), sgd.lr)


def cross_entropy(model: nn.Module, sgd: Sgd) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of plain fine-tuning: a batch of images and labels to a scalar."""
    return lambda images, labels: F.cross_entropy(
        model(images), labels, label_smoothing=sgd.label_smoothing
    )


def plain_step(optimizer: torch.optim.Optimizer, closure: Closure) -> Tensor:
    """Gradients at the present weights, then one step of the optimiser."""
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
        raise DivergedError(
            f"the loss became {float(losses[first])} in step {first + 1}: "
            f"try a lower learning rate than {lr}"
        )
    parts = losses.tensor_split(min(_AVERAGES, len(losses)))
    return [float(part.double().mean()) for part in parts]
