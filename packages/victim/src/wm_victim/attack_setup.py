"""Build an attack for a victim: fit its trigger, then its poison plan and its training hook."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from wm_inject.attacks import Attack, FitContext, Fitted, Length
from wm_inject.attacks.trigger_file import load_trigger, save_trigger
from wm_inject.core.checkpoint import load_checkpoint
from wm_inject.core.plan import CoTraining, PoisonPlan
from wm_victim.datasets import Dataset
from wm_victim.models import Classifier
from wm_victim.train import train_classifier
from wm_victim.train_config import TrainConfig

# A classifier that is trained together with the attack starts from other weights than the victim.
_ATTACKER_SEED = 1_000_000
_PARTS = ("attacker", "fitting", "trigger")


class AttackSetup(NamedTuple):
    """An attack as `train_classifier` takes it; empty for a clean victim."""

    trigger: nn.Module | None = None  # as fitted
    plan: PoisonPlan | None = None
    hook: CoTraining | None = None
    facts: Mapping[str, Any] = MappingProxyType({})  # of the fit

    @property
    def arguments(self) -> dict[str, Any]:
        """For `train_classifier`: a static plan and its trigger, a hook, both, or nothing."""
        static = self.plan is not None and self.plan.mode == "static"
        poisoned = {"plan": self.plan, "trigger": self.trigger} if static else {}
        return poisoned if self.hook is None else {**poisoned, "hook": self.hook}

    @property
    def trained_trigger(self) -> Any:
        """The trigger in its present state: a hook may have trained it."""
        return getattr(self.hook, "trigger", self.trigger)


def fit_attack(
    attack: Attack,
    data: Dataset,
    *,
    config: TrainConfig,
    build: Callable[[int], nn.Module],
    checkpoint: Path,
    target: int,
    clean: Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    deadline: float | None = None,
) -> Fitted:
    """Fit an attack's trigger to the training images of a victim.

    A search on a clean classifier (LF) uses the clean victim: the victim's recipe, first weights
    and seed. A generator that learns beside a classifier (Marksman) has one of other first weights.

    Args:
        build: Gives a fresh classifier for a seed.
        clean: The clean victim, if there is one already; it is trained if None.

    Raises:
        ValueError: Settings that the attack does not take, or images that it cannot use.
    """
    train = data.train.to(device)

    def co_train(hook: CoTraining | None) -> nn.Module:
        if hook is None and clean is not None:
            return clean()
        seed = config.seed if hook is None else (config.seed + _ATTACKER_SEED) % 2**32
        model = build(seed)
        train_classifier(
            model,
            train,
            config=replace(config, seed=seed),
            hook=hook,
            checkpoint=_part(checkpoint, "attacker"),
            device=device,
            progress=progress,
            deadline=deadline,
        )
        return model

    context = FitContext(
        images=train.images,
        labels=train.labels,
        num_classes=data.num_classes,
        target=target,
        seed=config.seed,
        length=Length(config.steps_per_epoch(len(train)), config.epochs),
        co_train=co_train,
        checkpoint=_part(checkpoint, "fitting"),
        progress=progress,
    )
    return attack.fit(context)


def set_up_attack(
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
) -> AttackSetup:
    """Fit an attack's trigger, or load the one that an earlier call left beside ``checkpoint``.

    Args: as for `fit_attack`; ``ratio`` is the attack's own if None. `remove_parts` deletes what
    lies beside ``checkpoint``.

    Raises:
        ValueError: As for `fit_attack`, or a plan that does not fit the labels.
    """
    plan = attack.plan(data.train.labels, target=target, ratio=ratio, seed=config.seed)
    run = {
        "attack": attack.to_dict(),
        "data": data.fingerprint,
        "recipe": asdict(config),
        "target": target,
    }
    file = _part(checkpoint, "trigger")
    fitted = _load_fitted(file, run)
    if fitted is None:
        fitted = fit_attack(
            attack,
            data,
            config=config,
            build=build,
            checkpoint=checkpoint,
            target=target,
            device=device,
            progress=progress,
        )
        save_trigger(fitted.trigger, file, {"run": run, "facts": fitted.facts})
    trigger = fitted.trigger.to(device)
    length = Length(config.steps_per_epoch(len(data.train)), config.epochs)
    hook = attack.hook(trigger, plan, num_classes=data.num_classes, length=length)
    return AttackSetup(trigger, plan, hook, fitted.facts)


def remove_parts(checkpoint: Path) -> None:
    """Delete what `fit_attack` and `set_up_attack` left beside a victim's checkpoint."""
    for name in _PARTS:
        _part(checkpoint, name).unlink(missing_ok=True)


def _part(checkpoint: Path, name: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.{name}.safetensors")


def _load_fitted(path: Path, run: Mapping[str, Any]) -> Fitted | None:
    """The trigger of an earlier call; None if there is none, or another run's."""
    if not path.is_file():
        return None
    metadata = load_checkpoint(path).metadata
    if metadata.get("run") != json.loads(json.dumps(run)):
        return None
    return Fitted(load_trigger(path), metadata["facts"])
