"""Train a classifier on clean, poisoned or co-trained data; a killed run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wm_inject.core.images import check_labels
from wm_inject.core.plan import CoTraining, PoisonPlan, Trigger, poison
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_victim.datasets import ImageSet
from wm_victim.inference import predict
from wm_victim.loop import Corrupt, Run
from wm_victim.measure import accuracy, attack_success
from wm_victim.recipe import TrainConfig, settings
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

    losses: tuple[float, ...]  # mean cross entropy, smoothed if asked, over the epoch's images
    accuracies: tuple[float, ...]  # share of them predicted as they are labelled, in training
    seconds: tuple[float, ...]  # wall time; 0 where a resumed run does not know it
    watched: tuple[dict[str, float], ...] = ()  # what ``watch`` gave after each epoch

    def to_dict(self) -> dict[str, list[Any]]:
        """What a record may hold: the same for the same seed."""
        kept: dict[str, list[Any]] = {
            "losses": list(self.losses),
            "accuracies": list(self.accuracies),
        }
        # A run that nobody watched has nothing to say of it.
        return kept | ({"watched": list(self.watched)} if any(self.watched) else {})


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
    corrupt: Corrupt | None = None,
    watch: Callable[[int, nn.Module], Mapping[str, float] | None] | None = None,
    deadline: float | None = None,
    resident_bytes: int | None = None,
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
        corrupt: What happens to every training batch last, after trigger and augmentation: images
            and a CPU ``generator`` in, images out.
        watch: Called after every epoch with its number (from 1) and the model in eval mode; what it
            returns goes into the history, and into the checkpoint. Once more for the same epoch if
            the run is killed before its checkpoint is written.
        deadline: A time of `time.monotonic`: no epoch starts after it.
        resident_bytes: The images stay on the device if they take no more than this, else batches
            are copied to it. If None: half of a GPU's free memory. It does not change the result.

    Returns:
        Loss, training accuracy and seconds of every epoch, and what ``watch`` saw.

    Raises:
        ValueError: Labels outside ``num_classes``, a model with another number of logits, a plan
            without a trigger (or the reverse), a per-batch plan, a plan beside a hook, a
            checkpoint of another run, or a ``layout`` or ``compile`` that the model or the device
            does not allow.
        RuntimeError: The loss became NaN or infinite.
        TimeoutError: The deadline came first. The same call with the same checkpoint goes on.
    """
    check_labels(data.labels, len(data), num_classes=num_classes)
    outputs = predict(model, data.images[:1]).shape[1]
    if outputs != num_classes:
        raise ValueError(f"expected a model with {num_classes} logits, got {outputs}")
    device = torch.device(device)
    data = _poisoned(data, plan, trigger, hook, num_classes)
    run = Run(model.to(device), data, config, hook, device, corrupt, resident_bytes)
    key = _describe(run, data) if checkpoint is not None else {}
    done = load_run(Path(checkpoint), run=key) if checkpoint is not None else None
    now = done or RunState((), (), (), (), {})
    if done is not None:
        run.load_state_dict(done.state)
    shown: Progress[Any]
    with show_progress(total=config.epochs * len(data), desc="training", enabled=progress) as shown:
        shown.update(len(now.losses) * len(data))
        for epoch in range(len(now.losses), config.epochs):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"out of time after epoch {epoch} of {config.epochs}")
            start = time.perf_counter()
            result = run.epoch(epoch, shown.update)
            shown.set_postfix(epoch=str(epoch + 1), loss=result.loss, accuracy=result.accuracy)
            seen = watch(epoch + 1, model.eval()) if watch is not None else None
            now = RunState(
                (*now.losses, result.loss),
                (*now.accuracies, result.accuracy),
                (*now.seconds, time.perf_counter() - start),
                (*now.watched, dict(seen or {})),
                run.state_dict(),
            )
            if checkpoint is not None:
                save_run(Path(checkpoint), now, run=key)
    model.eval()
    return TrainHistory(now.losses, now.accuracies, now.seconds, now.watched)


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


def _describe(run: Run, data: ImageSet) -> dict[str, Any]:
    """What a checkpoint must agree on to be of the same run."""
    model, config, corrupt = run.model, run.config, run.corrupt
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        "recipe": settings(config),
        "precision": str(run.precision),
        "model": getattr(model, "config", None) or shapes,
        "data": fingerprint(data.images, data.labels),
        "hook": None if run.hook is None else type(run.hook).__name__,
        "corrupt": None if corrupt is None else repr(corrupt),
    }
