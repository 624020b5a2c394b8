"""Train a classifier on clean, poisoned or co-trained data; a killed run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wm_inject.cli_common import Progress
from wm_inject.cli_common import progress as show_progress
from wm_inject.images import check_labels
from wm_inject.poison import CoTraining, PoisonPlan, Trigger, poison
from wm_victim.datasets import ImageSet
from wm_victim.loop import Run
from wm_victim.measure import accuracy, attack_success, predict
from wm_victim.recipe import TrainConfig, resolve_precision
from wm_victim.resume import RunState, fingerprint, load_run, save_run

__all__ = [
    "TrainConfig",
    "TrainHistory",
    "accuracy",
    "attack_success",
    "predict",
    "train_classifier",
]


@dataclass(frozen=True)
class TrainHistory:
    """What happened, epoch by epoch. ``seconds`` is left out of `to_dict`: it never repeats."""

    losses: tuple[float, ...]  # mean cross entropy over the epoch's images
    accuracies: tuple[float, ...]  # share of them predicted as they are labelled, in training
    seconds: tuple[float, ...]  # wall time; 0 where a resumed run does not know it

    def to_dict(self) -> dict[str, list[float]]:
        """What a record may hold: the same for the same seed."""
        return {"losses": list(self.losses), "accuracies": list(self.accuracies)}


def train_classifier(
    model: nn.Module,
    data: ImageSet,
    *,
    config: TrainConfig,
    num_classes: int,
    plan: PoisonPlan | None = None,
    trigger: Trigger | None = None,
    hook: CoTraining | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> TrainHistory:
    """Train a classifier with SGD and cross entropy, in place.

    A static attack is a ``plan`` with its ``trigger``: the data are poisoned once, before training,
    as a stored set would be. An attack that works on every batch is a ``hook``. The trainer knows
    no attack by name.

    Args:
        model: Images ``(N, C, H, W)`` in [0, 1] -> logits ``(N, K)``. It ends on ``device``, in
            eval mode.
        data: Clean training images.
        config: The recipe.
        num_classes: K.
        plan: A static poisoning plan.
        trigger: What the plan puts into the images.
        hook: A co-trained attack, called on every batch before augmentation.
        checkpoint: A file to write after every epoch, and to go on from if it is there. On the CPU
            a run that was killed ends with the weights it would have had, bit for bit, given the
            same number of threads.
        device: Where to train.
        progress: Show a bar on a terminal, or a line a minute elsewhere.
        on_epoch: Called after every epoch with its number (from 1) and the model in eval mode; once
            more for the same epoch if the run is killed before its checkpoint is written.

    Returns:
        Loss, training accuracy and seconds of every epoch.

    Raises:
        ValueError: Labels outside ``num_classes``, a model with another number of logits, a plan
            without a trigger (or the reverse), a per-batch plan, a plan beside a hook, or a
            checkpoint of another run.
        RuntimeError: The loss became NaN or infinite.
    """
    check_labels(data.labels, len(data), num_classes=num_classes)
    outputs = predict(model, data.images[:1]).shape[1]
    if outputs != num_classes:
        raise ValueError(f"expected a model with {num_classes} logits, got {outputs}")
    data = _poisoned(data, plan, trigger, hook, num_classes).to(device)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(model, data, config, hook, torch.device(device))
    key = _describe(model, data, config, hook) if checkpoint is not None else {}
    done = load_run(Path(checkpoint), run=key) if checkpoint is not None else None
    losses: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    if done is not None:
        losses, accuracies, seconds = done.losses, done.accuracies, done.seconds
        run.load_state_dict(done.state)
    total = config.epochs * len(data)
    shown: Progress[Any]
    with show_progress(total=total, desc="training", enabled=progress) as shown:
        shown.update(len(losses) * len(data))
        for epoch in range(len(losses), config.epochs):
            start = time.perf_counter()
            result = run.epoch(epoch, shown.update)
            losses += (result.loss,)
            accuracies += (result.accuracy,)
            seconds += (time.perf_counter() - start,)
            shown.set_postfix(epoch=str(epoch + 1), loss=result.loss, accuracy=result.accuracy)
            if on_epoch is not None:
                on_epoch(epoch + 1, model.eval())
            if checkpoint is not None:
                now = RunState(losses, accuracies, seconds, run.state_dict())
                save_run(Path(checkpoint), now, run=key)
    model.eval()
    return TrainHistory(losses, accuracies, seconds)


def _poisoned(
    data: ImageSet,
    plan: PoisonPlan | None,
    trigger: Trigger | None,
    hook: CoTraining | None,
    num_classes: int,
) -> ImageSet:
    if (plan is None) != (trigger is None):
        raise ValueError("expected a plan and a trigger together, got only one of them")
    if plan is None or trigger is None:
        return data
    if hook is not None:
        raise ValueError("expected a static plan or a hook, got both")
    done = poison(data.images, data.labels, trigger, plan, num_classes=num_classes, ids=data.ids)
    return ImageSet(done.images, done.labels, data.ids)


def _describe(
    model: nn.Module, data: ImageSet, config: TrainConfig, hook: CoTraining | None
) -> dict[str, Any]:
    """What a checkpoint must agree on to be of the same run."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        "recipe": asdict(config),
        "precision": str(resolve_precision(config.precision, data.images.device)),
        "model": getattr(model, "config", None) or shapes,
        "data": fingerprint(data.images, data.labels),
        "hook": None if hook is None else type(hook).__name__,
    }
