"""When is a backdoor learned, and when not? Victims that differ from one base in one thing.

For example ``python tools/explain_learning.py --out results/learning``.

Every victim is watched after every epoch on held-out images: attack success, accuracy, and the loss
on poisoned images alone, which tells "not learned yet" (it stays near the log of the number of
classes or above) from "learned and overruled". Exposures count how often a poisoned image was shown
until success passed 90 %. The base is BadNets on CIFAR-10; WaNet has rows of its own, because it is
learned late.
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

from wm_eval.config import plain
from wm_eval.study import fresh_classifier
from wm_eval.workspace import Made, Workspace
from wm_inject import BadNetsTrigger, BlendTrigger, PoisonPlan, WaNetTrigger, quantize
from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli
from wm_victim import Dataset, ImageSet, TrainConfig, load_dataset, predict, train_classifier

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


def watch(trigger: nn.Module, test: ImageSet, _: int, model: nn.Module) -> Mapping[str, float]:
    """Attack success, loss on poisoned images alone, and clean accuracy."""
    others = test.labels != TARGET
    with torch.no_grad():
        poisoned = predict(model, quantize(trigger(test.images[others])))
    asked = torch.full((len(poisoned),), TARGET, device=poisoned.device)
    clean = predict(model, test.images).argmax(1) == test.labels
    return {
        "asr": float((poisoned.argmax(1) == asked).float().mean()),
        "poison_loss": float(F.cross_entropy(poisoned, asked)),
        "cda": float(clean.float().mean()),
    }


def train_variant(variant: Variant, data: Dataset, space: Workspace, at: Path) -> Made:
    """Train one victim and say when its backdoor was learned."""
    seed, device = space.seed, space.device
    model = fresh_classifier(data, variant.model, width=variant.width, seed=seed)
    train, test = data.train.to(device), data.test.subset(torch.arange(WATCHED)).to(device)
    config = replace(variant.train, seed=seed)
    learn = partial(train_classifier, model, train, num_classes=data.num_classes, device=device)
    if variant.warm:
        # Another seed: the same one would show the same images in the same order once more.
        learn(config=replace(config, epochs=variant.warm, seed=seed + 1))
    side = data.image_size
    trigger: nn.Module
    attack: dict[str, Any]
    if variant.attack == "wanet":
        trigger = warp = WaNetTrigger(image_size=side, seed=seed).to(device)
        plan = PoisonPlan(ratio=RATIO, target=TARGET, mode="per_batch", seed=seed)
        attack = {"hook": warp.noise_hook(plan, num_classes=data.num_classes)}
        full, rest = divmod(len(train), config.batch_size)
        shown = full * int(RATIO * config.batch_size) + int(RATIO * rest)
    else:
        blend = BlendTrigger(image_size=side, channels=data.channels, seed=seed)
        trigger = (BadNetsTrigger(image_size=side) if variant.attack == "badnets" else blend).to(
            device
        )
        plan = PoisonPlan(ratio=RATIO, target=TARGET, seed=seed)
        attack = {"plan": plan, "trigger": trigger}
        shown = round(RATIO * len(train))
    history = learn(
        config=config, checkpoint=at, watch=partial(watch, trigger.eval(), test), **attack
    )
    steps = -(-len(train) // config.batch_size)
    passed = [n for n, row in enumerate(history.watched, 1) if row["asr"] >= LEARNED]
    learned = None
    if passed:
        learned = {"epoch": passed[0], "exposures": passed[0] * shown, "steps": passed[0] * steps}
    return Made(
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
    device = str(resolve_device(args.device))
    for name in args.only:
        variant = VARIANTS[name]
        data = load_dataset("cifar10", limit=variant.limit, seed=args.seed)
        space = Workspace(args.out, args.seed, data.fingerprint, device, print)
        space.stage(name, plain(variant), (), partial(train_variant, variant, data, space))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
