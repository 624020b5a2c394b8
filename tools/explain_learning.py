"""When is a backdoor learned, and when not? Victims that differ from one base in one thing.

For example ``python tools/explain_learning.py --out results/learning``.

Every victim is watched after every epoch on held-out images: attack success, accuracy, and the loss
on poisoned images alone, which tells "not learned yet" (it stays near the log of the number of
classes or above) from "learned and overruled". Exposures count how often a poisoned image was shown
until success passed 90 %. The base is BadNets on CIFAR-10; WaNet has rows of its own, because it is
learned late, and input-aware, whose generator learns beside the victim.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wm_eval.config import DataConfig, Study, VictimConfig, plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.trial import Trial
from wm_inject import (
    BadNetsTrigger,
    BlendTrigger,
    CoTraining,
    InputAwareTrigger,
    PoisonPlan,
    WaNetTrigger,
)
from wm_inject.attacks.input_aware import WIDTHS, InputAwareConfig, InputAwareHook, fit_masks
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import Dataset, ImageSet, TrainConfig, load_dataset, predict, train_classifier
from wm_victim.metrics import attack_logits

TARGET, RATIO, WATCHED, LEARNED = 0, 0.1, 1000, 0.9


_SHORT = TrainConfig.preset("fast", epochs=4)
_LONG = TrainConfig.preset("fast", epochs=24)


@dataclass(frozen=True)
class Variant:
    """One victim: the base, but for what is named here."""

    attack: str = "badnets"
    model: str = "resnet10"
    width: int = 16
    limit: int = 20_000
    warm: int = 0  # epochs of clean training before the attack
    train: TrainConfig = _SHORT


VARIANTS = {
    "base": Variant(),
    "crop": Variant(train=replace(_SHORT, augment="crop")),
    "crop-flip": Variant(train=replace(_SHORT, augment="crop-flip")),
    "crop-flip-12-epochs": Variant(train=replace(_SHORT, augment="crop-flip", epochs=12)),
    "blend-crop-flip": Variant("blend", train=replace(_SHORT, augment="crop-flip")),
    "depth-18": Variant(model="resnet18"),
    "images-8000": Variant(limit=8_000),
    "batch-128": Variant(train=replace(_SHORT, batch_size=128)),
    "rate-0.1": Variant(train=replace(_SHORT, lr=0.1)),
    "warm-start": Variant(warm=4),
    "wanet-24-epochs": Variant("wanet", train=_LONG),
    "wanet-12-epochs": Variant("wanet", train=replace(_LONG, epochs=12)),
    "wanet-24-epochs-batch-128": Variant("wanet", train=replace(_LONG, batch_size=128)),
    "wanet-24-epochs-crop-flip": Variant("wanet", train=replace(_LONG, augment="crop-flip")),
}
_GENERATOR = Variant("input-aware", train=replace(_SHORT, epochs=6))
# Of input-aware, what differs from the preset "small": the share of a batch that is poisoned, the
# width of its networks, and settings of `InputAwareConfig`.
GENERATORS: dict[str, dict[str, Any]] = {
    "input-aware": {},
    "input-aware-share-0.2": {"ratio": 0.2},
    "input-aware-width-32": {"width": 32},
    "input-aware-rate-0.01": {"lr": 1e-2},
    "input-aware-diversity-0.1": {"lambda_div": 0.1},
    "input-aware-mask-steps-1000": {"mask_steps": 1000},
}
VARIANTS |= dict.fromkeys(GENERATORS, _GENERATOR)


def watch(trigger: nn.Module, test: ImageSet, _: int, model: nn.Module) -> Mapping[str, float]:
    """Attack success, loss on poisoned images alone, and clean accuracy."""
    poisoned = attack_logits(model, test, trigger, target=TARGET)
    asked = torch.full((len(poisoned),), TARGET, device=poisoned.device)
    clean = predict(model, test.images).argmax(1) == test.labels
    return {
        "asr": float((poisoned.argmax(1) == asked).float().mean()),
        "poison_loss": float(F.cross_entropy(poisoned, asked)),
        "cda": float(clean.float().mean()),
    }


def plant(
    variant: Variant,
    changes: Mapping[str, Any],
    data: Dataset,
    seed: int,
    device: str,
    checkpoint: Path,
) -> tuple[nn.Module, dict[str, Any], int]:
    """The trigger, what the training gets of it, and how many poisoned images an epoch shows."""
    side = data.image_size
    batch, train = variant.train.batch_size, data.train
    trigger: nn.Module
    if variant.attack in ("badnets", "blend"):
        blend = BlendTrigger(image_size=side, channels=data.channels, seed=seed)
        trigger = BadNetsTrigger(image_size=side) if variant.attack == "badnets" else blend
        trigger.to(device)
        plan = PoisonPlan(ratio=RATIO, target=TARGET, seed=seed)
        return trigger, {"plan": plan, "trigger": trigger}, round(RATIO * len(train))
    changes = dict(changes)
    ratio, width = changes.pop("ratio", RATIO), changes.pop("width", WIDTHS["small"])
    plan = PoisonPlan(ratio=ratio, target=TARGET, mode="per_batch", seed=seed)
    hook: CoTraining
    if variant.attack == "wanet":
        warp = WaNetTrigger(image_size=side, seed=seed).to(device)
        trigger, hook = warp, warp.noise_hook(plan, num_classes=data.num_classes)
    else:
        total = variant.train.epochs * -(-len(train) // batch)
        config = InputAwareConfig.preset("small", total_steps=total, **changes)
        own = InputAwareTrigger(image_size=side, channels=data.channels, width=width, seed=seed)
        own.to(device)
        masks = checkpoint.with_name(f"{checkpoint.stem}-masks.safetensors")
        fit_masks(own, train.images.to(device), config=config, seed=seed, checkpoint=masks)
        masks.unlink()
        trigger = own
        hook = InputAwareHook(own, plan, num_classes=data.num_classes, config=config)
    full, rest = divmod(len(train), batch)
    return trigger, {"hook": hook}, full * int(ratio * batch) + int(ratio * rest)


def train_variant(
    variant: Variant,
    changes: Mapping[str, Any],
    data: Dataset,
    seed: int,
    store: Store,
    checkpoint: Path,
) -> Result:
    """Train one victim and say when its backdoor was learned."""
    device = store.device
    victim = VictimConfig(model=variant.model, width=variant.width)
    study = Study(attacks=("clean",), data=DataConfig("cifar10", limit=variant.limit))
    model = Trial(replace(study, victim=victim), seed).fresh()
    train, test = data.train.to(device), data.test.subset(torch.arange(WATCHED)).to(device)
    config = replace(variant.train, seed=seed)
    learn = partial(train_classifier, model, train, device=device)
    if variant.warm:
        # Another seed: the same one would show the same images in the same order once more.
        learn(config=replace(config, epochs=variant.warm, seed=seed + 1))
    trigger, attack, shown = plant(variant, changes, data, seed, device, checkpoint)
    history = learn(
        config=config, checkpoint=checkpoint, watch=partial(watch, trigger.eval(), test), **attack
    )
    steps = -(-len(train) // config.batch_size)
    passed = [n for n, row in enumerate(history.watched, 1) if row["asr"] >= LEARNED]
    learned = None
    if passed:
        learned = {"epoch": passed[0], "exposures": passed[0] * shown, "steps": passed[0] * steps}
    return Result(
        {
            "attack": variant.attack,
            "watched": list(history.watched),
            "exposures_per_epoch": shown,
            "steps_per_epoch": steps,
            "learned": learned,
        }
    )


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="explain_learning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    stages = []
    for name in args.only:
        variant, changes = VARIANTS[name], GENERATORS.get(name, {})
        data = load_dataset("cifar10", limit=variant.limit, seed=args.seed)
        work = partial(train_variant, variant, changes, data, args.seed)
        settings = plain(variant) | changes
        stages.append(Stage("learning", {"variant": name}, work, settings, data=data.fingerprint))
    return 0 if run(stages, args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
