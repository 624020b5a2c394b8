"""Plant an attack by its name: make the trigger, and say what the training of the victim gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from wm_inject.attacks import Attack, FitContext, Fitted, Length
from wm_inject.core.checkpoint import load_checkpoint
from wm_inject.core.plan import CoTraining, PoisonPlan
from wm_inject.triggers import load_trigger, save_trigger
from wm_victim.datasets import Dataset, ImageSet
from wm_victim.models import Classifier
from wm_victim.train import train_classifier
from wm_victim.train_config import TrainConfig

# The attacker's own classifier, where an attack needs one, starts from other weights than the
# victim and sees the images in another order.
_ATTACKER = 1_000_000
_PARTS = ("attacker", "fitting", "trigger")


class Planting(NamedTuple):
    """What the training of a victim gets of an attack, and what to record of it."""

    plan: PoisonPlan
    fitted: Fitted
    hook: CoTraining | None

    @property
    def arguments(self) -> dict[str, Any]:
        """For `train_classifier`: a plan and its trigger, or a hook."""
        if self.hook is not None:
            return {"hook": self.hook}
        return {"plan": self.plan, "trigger": self.fitted.trigger}

    @property
    def trigger(self) -> nn.Module:
        """The trigger as it is by now: a hook may have trained it."""
        trigger: nn.Module = getattr(self.hook, "trigger", self.fitted.trigger)
        return trigger


def plant(
    attack: Attack,
    data: Dataset,
    *,
    config: TrainConfig,
    build: Callable[[int], Classifier],
    checkpoint: Path,
    target: int,
    ratio: float | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Planting:
    """Make an attack ready to be planted in a victim.

    Args:
        attack: Which one.
        data: The victim's data; the trigger is fitted to its training images.
        config: The victim's recipe, and that of the attacker's own classifier if there is one.
        build: A fresh classifier from a seed.
        checkpoint: The victim's checkpoint. What fitting has done so far lies beside it, so that a
            run that was stopped goes on; `remove_parts` deletes it.
        target: The label that the attack asks for.
        ratio: Share poisoned; the attack's own if None.
        device: Where to compute.
        progress: Show a bar on a terminal, or a line a minute elsewhere.

    Raises:
        ValueError: Settings that the attack does not take, images that it cannot use, or a plan
            that does not fit the labels.
    """
    train = data.train.to(device)
    plan = attack.plan(data.train.labels, target=target, ratio=ratio, seed=config.seed)
    length = Length(config.steps_per_epoch(len(train)), config.epochs)
    run = {
        "attack": {**asdict(attack), "settings": dict(attack.settings)},
        "data": data.fingerprint,
        "recipe": asdict(config),
        "target": target,
    }
    kept = _part(checkpoint, "trigger")
    fitted = _load_fitted(kept, run)
    if fitted is None:
        context = FitContext(
            images=train.images,
            labels=train.labels,
            num_classes=data.num_classes,
            target=target,
            seed=config.seed,
            length=length,
            co_train=partial(_co_train, train, config, build, checkpoint, progress),
            checkpoint=_part(checkpoint, "fitting"),
            progress=progress,
        )
        fitted = attack.fit(context)
        save_trigger(fitted.trigger, kept, {"run": run, "facts": fitted.facts})
    fitted.trigger.to(device)
    hook = attack.hook(fitted.trigger, plan, num_classes=data.num_classes, length=length)
    return Planting(plan, fitted, hook)


def remove_parts(checkpoint: Path) -> None:
    """Delete what `plant` left beside a victim's checkpoint."""
    for name in _PARTS:
        _part(checkpoint, name).unlink(missing_ok=True)


def _part(checkpoint: Path, name: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.{name}.safetensors")


def _load_fitted(path: Path, run: Mapping[str, Any]) -> Fitted | None:
    """The trigger of an earlier call that was stopped later on; None if it is another run's."""
    if not path.is_file():
        return None
    kept = load_checkpoint(path).metadata
    if kept.get("run") != json.loads(json.dumps(run)):
        return None
    return Fitted(load_trigger(path), kept["facts"])


def _co_train(
    train: ImageSet,
    config: TrainConfig,
    build: Callable[[int], Classifier],
    checkpoint: Path,
    progress: bool,
    hook: CoTraining | None,
) -> nn.Module:
    """The attacker's own classifier: clean, or trained together with the attack."""
    seed = (config.seed + _ATTACKER) % 2**32
    model = build(seed)
    train_classifier(
        model,
        train,
        config=replace(config, seed=seed),
        hook=hook,
        checkpoint=_part(checkpoint, "attacker"),
        device=train.images.device,
        progress=progress,
    )
    return model
