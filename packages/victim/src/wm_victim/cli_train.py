"""``wm-victim train``: train a classifier, clean or with a backdoor."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wm_inject.attacks import list_attacks
from wm_inject.command.common import Parser, resolve_device
from wm_inject.command.config import add_options, add_preset, read_settings
from wm_inject.command.trigger_options import add_set
from wm_inject.command.values import output_file
from wm_inject.core.checks import check_choice
from wm_inject.core.toml_settings import load_toml
from wm_victim.train_config import CLASSIFIERS, Augment, TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from wm_inject.core.plan import PoisonPlan
    from wm_victim.attack_setup import AttackSetup
    from wm_victim.datasets import Dataset
    from wm_victim.models import Classifier


@dataclass(frozen=True)
class TrainSettings:
    """Settings of ``wm-victim train``, as its options describe them.

    Raises:
        ValueError: An unknown attack or model, or a number outside its range.
    """

    image_size: int | None = None
    limit: int | None = None
    model: str = "resnet10"
    width: int | None = None
    attack: str | None = None
    profile: Literal["tiny", "small", "paper"] | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    target: int = 0
    ratio: float | None = None
    clean_label: bool = False
    noise_mode: bool = False
    seed: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig.preset("fast"))

    def __post_init__(self) -> None:
        if self.attack is not None:
            check_choice("an attack", self.attack, list_attacks())
        if not self.model.startswith(("timm:", "imagenet:")):
            check_choice("a model of timm:NAME, imagenet:NAME or", self.model, CLASSIFIERS)
        ranges = {"image_size": (8, 1024), "limit": (1, math.inf), "width": (8, 512)}
        for name, (low, high) in (ranges | {"target": (0, math.inf)}).items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"expected {name} in {low} .. {high}, got {value}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"expected ratio in (0, 1], got {self.ratio}")


def add_train(parser: Parser) -> None:
    """Give ``parser`` the options of the model, its training and its attack."""
    group = parser.add_argument_group("model and recipe")
    helps = {
        "limit": "train on the first N of a stratified order",
        "model": f"{', '.join(CLASSIFIERS)}, timm:NAME or imagenet:NAME",
        "width": "channels of the first stage (default: 64)",
    }
    add_options(group, TrainSettings, helps)
    presets = ("paper", "fast", "mnist", "record", "airbench")
    text = "the recipe; the options below change it (default: fast)"
    add_preset(group, "--preset", table="training", choices=presets, help=text)
    helps = {
        "epochs": "passes over the data",
        "batch_size": "images a step",
        "lr": "the highest learning rate",
        "schedule": "how the learning rate changes",
        "augment": "of training images",
        "precision": "auto: bfloat16 where the hardware multiplies it fast",
        "layout": "blocked: for CPUs",
    }
    add_options(group, TrainConfig, helps, table="training")
    group = parser.add_argument_group("attack")
    group.add_argument("--trigger", type=Path, help="poison with this trigger file")
    group.add_argument(
        "--attack",
        choices=list_attacks(),
        metavar="NAME",
        help=f"or make the trigger first, as the attack does: {', '.join(list_attacks())}",
    )
    add_set(group)
    group.add_argument(
        "--save-trigger", type=output_file, metavar="PATH", help="keep the trigger here"
    )
    helps = {
        "profile": "how much making the trigger may cost (default: small)",
        "target": "target label",
        "ratio": "fraction poisoned (default: 0.1, or the attack's own)",
        "clean_label": "poison images of the target class only",
        "noise_mode": "poison every batch anew, with noise images beside (a warp trigger, as WaNet "
        "trains)",
    }
    add_options(group, TrainSettings, helps)


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The settings that options and file give; a usage error if they do not go together.

    Raises:
        ValueError: Settings that do not fit.
    """
    settings, error = read_settings(args, TrainSettings()), args.parser.error
    if settings.attack and args.trigger:
        error("give either --attack, which makes its trigger, or --trigger")
    if settings.noise_mode and args.trigger is None:
        error("--noise-mode needs a --trigger")
    if settings.attack and settings.clean_label:
        error("--clean-label goes with --trigger: an attack knows how it labels")
    of_attack = {"--profile": settings.profile, "--set": settings.set}
    for option, value in (of_attack | {"--save-trigger": args.save_trigger}).items():
        if value and not settings.attack:
            error(f"{option} goes with --attack")
    return settings


def run_train(
    args: argparse.Namespace, settings: TrainSettings, data: Dataset
) -> tuple[Classifier, nn.Module | None]:
    """Train, and write the classifier and its trigger.

    Returns:
        The classifier, and the trigger of its backdoor if it has one.
    """
    from wm_inject import save_trigger
    from wm_victim.attack_setup import AttackSetup, remove_parts
    from wm_victim.models import save_classifier
    from wm_victim.train import train_classifier

    config, device = _recipe(args, settings, data), resolve_device(args.device)
    build = partial(_build, settings, data)
    model = build(settings.seed)
    checkpoint = args.checkpoint or args.out.with_name(f"{args.out.stem}.training.safetensors")
    setup = AttackSetup()
    if args.trigger is not None:
        setup = _from_file(args.trigger, settings, data, args.device)
    elif settings.attack is not None:
        from wm_inject.attacks import attack
        from wm_victim.attack_setup import set_up_attack

        setup = set_up_attack(
            attack(settings.attack, profile=settings.profile or "small", **settings.set),
            data,
            config=config,
            build=build,
            checkpoint=checkpoint,
            target=settings.target,
            ratio=settings.ratio,
            device=device,
        )
    history = train_classifier(
        model,
        data.train.to(device),
        config=config,
        checkpoint=checkpoint,
        device=device,
        **setup.arguments,
    )
    metadata = {
        "data": {"name": data.name, "fingerprint": data.fingerprint, "limit": settings.limit},
        "classes": list(data.classes),
        "preset": _preset_name(args),
        "recipe": asdict(config),
        "attack": None if setup.plan is None else _attack_metadata(settings, setup),
        "history": history.to_dict(),
    }
    save_classifier(model, args.out, metadata)
    if args.save_trigger is not None and setup.plan is not None:
        save_trigger(setup.trained_trigger, args.save_trigger, {"attack": metadata["attack"]})
    if args.checkpoint is None:
        checkpoint.unlink(missing_ok=True)
        remove_parts(checkpoint)
    return model, None if setup.plan is None else setup.trained_trigger.eval()


def _preset_name(args: argparse.Namespace) -> str | None:
    """The preset that the recipe starts from; None if a file lists its fields."""
    name: str | None = getattr(args, "training.preset")
    if name is None and args.config is not None:
        table = load_toml(args.config).get("training", {"preset": "fast"})
        return table.get("preset")
    return name or "fast"


def _recipe(args: argparse.Namespace, settings: TrainSettings, data: Dataset) -> TrainConfig:
    from wm_victim.datasets import MIRROR_CHANGES_LABEL

    config = replace(settings.training, seed=settings.seed)
    unmirrored: dict[str, Augment] = {"crop-flip": "crop", "alternating": "shift"}
    mode = unmirrored.get(config.augment)
    if mode is not None and MIRROR_CHANGES_LABEL & {*data.name.split("+")}:
        if getattr(args, "training.augment") is not None:
            raise ValueError(
                f"a mirrored image of {data.name} is of no class: use --augment {mode}"
            )
        config = replace(config, augment=mode)
    return config


def _build(settings: TrainSettings, data: Dataset, seed: int) -> Classifier:
    from wm_victim.models import DATASET_STATS, build_classifier

    mean, std = DATASET_STATS.get(data.name, (None, None))
    return build_classifier(
        settings.model,
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        width=settings.width,
        mean=mean,
        std=std,
        seed=seed,
    )


def _from_file(path: Path, settings: TrainSettings, data: Dataset, device: str) -> AttackSetup:
    from wm_inject import load_trigger
    from wm_victim.attack_setup import AttackSetup

    trigger: Any = load_trigger(path).to(resolve_device(device))
    plan, hook = _plan(settings), None
    if settings.noise_mode:
        if not hasattr(trigger, "noise_hook"):
            raise ValueError(f"a {trigger.kind} trigger has no noise mode: leave it out")
        hook = trigger.noise_hook(plan, num_classes=data.num_classes)
    return AttackSetup(trigger, plan, hook)


def _plan(settings: TrainSettings) -> PoisonPlan:
    from wm_inject.core.plan import PoisonPlan

    return PoisonPlan(
        ratio=0.1 if settings.ratio is None else settings.ratio,
        target=settings.target,
        label_map="clean-label" if settings.clean_label else "all-to-one",
        pool="target" if settings.clean_label else "all",
        mode="per_batch" if settings.noise_mode else "static",
        seed=settings.seed,
    )


def _attack_metadata(settings: TrainSettings, setup: AttackSetup) -> dict[str, Any]:
    trigger, plan = setup.trained_trigger, setup.plan
    assert plan is not None
    metadata = {
        "trigger": {"kind": trigger.kind, "config": trigger.config},
        "plan": plan.to_dict(),
        "noise_mode": settings.noise_mode,
    }
    if settings.attack is None:
        return metadata
    changes = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.set.items()]
    return metadata | {
        "name": settings.attack,
        "profile": settings.profile or "small",
        "settings": changes,
        "facts": dict(setup.facts),
    }
