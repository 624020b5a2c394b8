"""``wm-victim train``: train a classifier, clean or with an attack planted in it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import resolve_device

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from wm_inject.core.plan import PoisonPlan
    from wm_victim.datasets import Dataset
    from wm_victim.models import Classifier
    from wm_victim.planting import Planting
    from wm_victim.recipe import TrainConfig


def run_train(args: argparse.Namespace, data: Dataset) -> tuple[Classifier, nn.Module | None]:
    """Train and write what was asked for; the classifier, and the trigger if one was planted."""
    from wm_inject.triggers import save_trigger
    from wm_victim.models import save_classifier
    from wm_victim.planting import remove_parts
    from wm_victim.recipe import settings
    from wm_victim.resume import remove_run
    from wm_victim.train import train_classifier

    config, device = _recipe(args, data), resolve_device(args.device)
    model = _build(args, data, args.seed)
    checkpoint = args.checkpoint or args.out.with_name(f"{args.out.stem}.training.safetensors")
    planting = _planting(args, data, config, checkpoint)
    history = train_classifier(
        model,
        data.train.to(device),
        config=config,
        num_classes=data.num_classes,
        checkpoint=checkpoint,
        device=device,
        **({} if planting is None else planting.arguments),
    )
    metadata = {
        "data": {"name": data.name, "fingerprint": data.fingerprint, "limit": args.limit},
        "classes": list(data.classes),
        "preset": args.preset,
        "recipe": settings(config),
        "attack": None if planting is None else _describe(args, planting),
        "history": history.to_dict(),
    }
    save_classifier(model, args.out, metadata)
    trigger = None if planting is None else planting.trigger.eval()
    if args.save_trigger is not None and planting is not None:
        save_trigger(planting.trigger, args.save_trigger, {"attack": metadata["attack"]})
    if args.checkpoint is None:
        remove_run(checkpoint)
        remove_parts(checkpoint)
    return model, trigger


def _recipe(args: argparse.Namespace, data: Dataset) -> TrainConfig:
    from wm_victim.datasets import MIRROR_CHANGES_LABEL

    config: TrainConfig = replace(args.training, seed=args.seed)
    if config.augment == "crop-flip" and data.name in MIRROR_CHANGES_LABEL:
        if args.augment is not None:
            raise ValueError(f"a mirrored image of {data.name} is of no class: use --augment crop")
        config = replace(config, augment="crop")
    return config


def _build(args: argparse.Namespace, data: Dataset, seed: int) -> Classifier:
    from wm_victim.models import DATASET_STATS, build_classifier

    mean, std = DATASET_STATS.get(data.name, (None, None))
    return build_classifier(
        args.model,
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        width=args.width,
        mean=mean,
        std=std,
        seed=seed,
    )


def _planting(
    args: argparse.Namespace, data: Dataset, config: TrainConfig, checkpoint: Path
) -> Planting | None:
    """What the attack options ask for: an attack by its name, a trigger from a file, or nothing."""
    if args.trigger is not None:
        return _from_file(args, data)
    if args.attack is None:
        return None
    from wm_inject.attacks import attack
    from wm_victim.planting import plant

    return plant(
        attack(args.attack, profile=args.profile or "small", **args.set),
        data,
        config=config,
        build=partial(_build, args, data),
        checkpoint=checkpoint,
        target=args.target,
        ratio=args.ratio,
        device=resolve_device(args.device),
    )


def _from_file(args: argparse.Namespace, data: Dataset) -> Planting:
    from wm_inject.attacks import Fitted
    from wm_inject.triggers import load_trigger
    from wm_victim.planting import Planting

    trigger: Any = load_trigger(args.trigger).to(resolve_device(args.device))
    plan, hook = _plan(args), None
    if args.noise_mode:
        if not hasattr(trigger, "noise_hook"):
            raise ValueError(f"a {trigger.kind} trigger has no noise mode: leave it out")
        hook = trigger.noise_hook(plan, num_classes=data.num_classes)
    return Planting(plan, Fitted(trigger, {}), hook)


def _plan(args: argparse.Namespace) -> PoisonPlan:
    from wm_inject.core.plan import PoisonPlan

    return PoisonPlan(
        ratio=0.1 if args.ratio is None else args.ratio,
        target=args.target,
        label_map="clean-label" if args.clean_label else "all-to-one",
        pool="target" if args.clean_label else "all",
        mode="per_batch" if args.noise_mode else "static",
        seed=args.seed,
    )


def _describe(args: argparse.Namespace, planting: Planting) -> dict[str, Any]:
    trigger: Any = planting.trigger
    described = {
        "trigger": {"kind": trigger.kind, "config": trigger.config},
        "plan": asdict(planting.plan),
        "noise_mode": args.noise_mode,
    }
    if args.attack is None:
        return described
    given = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in args.set.items()]
    made = {"name": args.attack, "profile": args.profile or "small", "settings": given}
    return {**described, **made, "facts": planting.fitted.facts}
