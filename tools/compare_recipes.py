"""Which clean accuracy do the recipes, the layouts and the options of training reach?

For example ``WM_DATA=... python tools/compare_recipes.py --out results/recipes-cifar10``.

A narrow ResNet-18 (width 16, for a CPU) learns 20,000 images of CIFAR-10 in 24 epochs, once with
the paper's recipe shortened to them and once with the record-holders', each in both layouts. A
narrow PreActResNet-18 learns all images in 12 epochs of the paper's recipe, with one option of the
``airbench`` recipe at a time, and with all. Accuracy on the test images after every epoch is
recorded, not used for anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from wm_eval.config import DataConfig, Study, VictimConfig, plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.trial import Trial
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import ImageSet, TrainConfig, accuracy, train_classifier

WIDTH, EPOCHS = 16, 24
RECIPES = {
    "paper": TrainConfig.preset("paper", epochs=EPOCHS),
    "record": TrainConfig.preset("record", epochs=EPOCHS),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nesterov": {"nesterov": True},
    "triangular": {"schedule": "triangular"},
    "alternating": {"augment": "alternating"},
    "smoothing": {"label_smoothing": 0.2},
    "average": {"average": 5},
    "bias-rate": {"bias_lr": 64.0},
}
SHORT = TrainConfig.preset("paper", epochs=12, layout="blocked")


class Variant(NamedTuple):
    """One classifier to train."""

    kind: str  # of its record
    key: dict[str, str]
    study: Study
    config: TrainConfig


def _study(model: str, limit: int | None) -> Study:
    return Study(
        attacks=("clean",),
        data=DataConfig("cifar10", limit=limit),
        victim=VictimConfig(model=model, width=WIDTH),
    )


VARIANTS = {
    f"{recipe}-{layout}": Variant(
        "recipe",
        {"recipe": recipe, "layout": layout},
        _study("resnet18", 20_000),
        replace(config, layout=layout),
    )
    for recipe, config in RECIPES.items()
    for layout in ("channels-last", "blocked")
}
VARIANTS |= {
    f"option-{name}": Variant(
        "option", {"option": name}, _study("preactresnet18", None), replace(SHORT, **changes)
    )
    for name, changes in {
        "none": {},
        **OPTIONS,
        "all": {k: v for changes in OPTIONS.values() for k, v in changes.items()},
    }.items()
}


def watch(test: ImageSet, _: int, model: nn.Module) -> Mapping[str, float]:
    """The share of test images that get their label."""
    return {"accuracy": accuracy(model, test)}


def train_variant(config: TrainConfig, trial: Trial, store: Store, checkpoint: Path) -> Result:
    """Train one classifier on clean images."""
    data = trial.data
    history = train_classifier(
        trial.fresh(),
        data.train,
        config=replace(config, seed=trial.seed),
        device=torch.device(store.device),
        checkpoint=checkpoint,
        watch=partial(watch, data.test),
    )
    return Result({"n": len(data.test), "watched": list(history.watched)})


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="compare_recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    stages = []
    for name in args.only:
        kind, key, study, config = VARIANTS[name]
        trial = Trial(study, args.seed)
        settings = {"model": study.victim.model, "width": WIDTH} | plain(config)
        work = partial(train_variant, config, trial)
        stages.append(Stage(kind, key, work, settings, data=trial.fingerprint))
    return 0 if run(stages, args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
