"""Train a classifier on clean, poisoned or co-trained data; a killed run can be continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wm_inject.core.images import check_labels
from wm_inject.core.plan import CoTraining, PoisonPlan, Trigger, poison
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import fingerprint, load_state, save_state
from wm_victim.datasets import ImageSet
from wm_victim.inference import predict
from wm_victim.train_config import TrainConfig
from wm_victim.training_run import Corrupt, TrainingRun

_KIND = "training"


@dataclass(frozen=True)
class TrainHistory:
    """What was measured in every epoch."""

    losses: tuple[float, ...] = ()  # mean training cross entropy
    accuracies: tuple[float, ...] = ()  # on the training batches
    seconds: tuple[float, ...] = ()  # wall time; 0 for epochs before a resumption
    watched: tuple[dict[str, float], ...] = ()  # what ``watch`` returned

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain values for a record; without ``seconds``, which are not reproducible."""
        values = {"losses": list(self.losses), "accuracies": list(self.accuracies)}
        return values | ({"watched": list(self.watched)} if any(self.watched) else {})


def train_classifier(
    model: nn.Module,
    data: ImageSet,
    *,
    config: TrainConfig,
    plan: PoisonPlan | None = None,
    trigger: Trigger | None = None,
    hook: CoTraining | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    corrupt: Corrupt | None = None,
    watch: Callable[[int, nn.Module], Mapping[str, float] | None] | None = None,
    deadline: float | None = None,
    resident_bytes: int | None = None,
) -> TrainHistory:
    """Train a classifier with SGD and cross entropy, in place.

    A static attack is a ``plan`` with its ``trigger``: the data are poisoned once, before training,
    as a stored set would be. An attack that works on every batch is a ``hook``; beside a plan it
    gets batches of the poisoned data. The trainer knows no attack by name.

    Args:
        model: The classifier; it ends on ``device``, in eval mode.
        data: Clean training images.
        config: The recipe.
        plan: A static poisoning plan.
        trigger: What the plan puts into the images.
        hook: A co-trained attack, called on every batch before augmentation.
        checkpoint: A file that is written after every epoch, and from which a run continues. It is
            not removed at the end. On the CPU a continued run ends with the same weights, bit for
            bit, given the same number of threads.
        corrupt: Changes every training batch last, after trigger and augmentation: images and a CPU
            ``generator`` in, images out.
        watch: Called after every epoch with its number (from 1) and the model in eval mode; what it
            returns goes into the history and the checkpoint. Called once more for the same epoch if
            the run is killed before its checkpoint is written.
        deadline: A time of `time.monotonic`: no epoch starts after it.
        resident_bytes: The images stay on the device if they take no more than this, else batches
            are copied to it. If None: half of a GPU's free memory. It does not change the result.

    Raises:
        ValueError: Labels that the model has no logits for, a plan without a trigger (or the
            reverse), a per-batch plan, a checkpoint of another run, or a
            ``layout`` or ``compile`` that the model or the device does not allow.
        RuntimeError: The loss became NaN or infinite.
        TimeoutError: The deadline came first. The same call with the same checkpoint continues.
    """
    num_classes = predict(model, data.images[:1]).shape[1]
    check_labels(data.labels, len(data), num_classes=num_classes)
    device = torch.device(device)
    data = _poisoned(data, plan, trigger, num_classes)
    run = TrainingRun(model.to(device), data, config, hook, device, corrupt, resident_bytes)
    history, earlier = TrainHistory(), None
    if checkpoint is not None:
        identity = _identity(run, data)
        earlier = load_state(checkpoint, kind=_KIND, run=identity)
        if earlier is not None:
            run.load_state_dict(earlier["run"])
            history = TrainHistory(**earlier["history"])
            history = replace(history, seconds=(0.0,) * len(history.losses))
    if earlier is None:
        run.prepare()
    shown: Progress[Any]
    with show_progress(total=config.epochs * len(data), desc="training", enabled=progress) as shown:
        shown.update(len(history.losses) * len(data))
        for epoch in range(len(history.losses), config.epochs):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"out of time after epoch {epoch} of {config.epochs}")
            start = time.perf_counter()
            loss, accuracy = run.epoch(epoch, shown.update)
            shown.set_postfix(epoch=str(epoch + 1), loss=loss, accuracy=accuracy)
            watched = watch(epoch + 1, model.eval()) if watch is not None else None
            history = TrainHistory(
                (*history.losses, loss),
                (*history.accuracies, accuracy),
                (*history.seconds, time.perf_counter() - start),
                (*history.watched, dict(watched or {})),
            )
            if checkpoint is not None:
                # Without the seconds, so that the bytes of a checkpoint repeat.
                state = {"history": asdict(replace(history, seconds=())), "run": run.state_dict()}
                save_state(checkpoint, state, kind=_KIND, run=identity)
    model.eval()
    return history


def _poisoned(
    data: ImageSet,
    plan: PoisonPlan | None,
    trigger: Trigger | None,
    num_classes: int,
) -> ImageSet:
    if (plan is None) != (trigger is None):
        raise ValueError("expected a plan and a trigger together, got only one of them")
    if plan is None or trigger is None:
        return data
    done = poison(data.images, data.labels, trigger, plan, num_classes=num_classes, ids=data.ids)
    return ImageSet(done.images, done.labels, data.ids)


def _identity(run: TrainingRun, data: ImageSet) -> dict[str, Any]:
    """What a checkpoint must agree on to be of the same run."""
    shapes = {name: list(tensor.shape) for name, tensor in run.model.state_dict().items()}
    return {
        "recipe": asdict(run.config),
        "precision": str(run.precision),
        "model": getattr(run.model, "config", None) or shapes,
        "data": fingerprint(data.images, data.labels),
        "hook": None if run.hook is None else type(run.hook).__name__,
        "corrupt": None if run.corrupt is None else repr(run.corrupt),
    }
