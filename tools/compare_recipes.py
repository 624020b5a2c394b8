"""Which clean accuracy do the recipes and the layouts of training reach in as many epochs?

For example ``WM_DATA=... python tools/compare_recipes.py --out results/recipes-cifar10``.

A narrow ResNet-18 (width 16, for a CPU) learns 20,000 images of CIFAR-10 in 24 epochs, once with
the paper's recipe shortened to them and once with the record-holders', each in both layouts.
Accuracy on the test images after every epoch is recorded, not used for anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from wm_eval.config import DataConfig, Study, VictimConfig, plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.trial import Trial
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import ImageSet, TrainConfig, accuracy, train_classifier

MODEL, WIDTH, IMAGES, EPOCHS = "resnet18", 16, 20_000, 24
RECIPES = {
    "paper": TrainConfig.preset("paper", epochs=EPOCHS),
    "record": TrainConfig.preset("record", epochs=EPOCHS),
}
VARIANTS = {
    f"{recipe}-{layout}": ({"recipe": recipe, "layout": layout}, replace(config, layout=layout))
    for recipe, config in RECIPES.items()
    for layout in ("channels-last", "blocked")
}
STUDY = Study(
    attacks=("clean",),
    data=DataConfig("cifar10", limit=IMAGES),
    victim=VictimConfig(model=MODEL, width=WIDTH),
)


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
    trial = Trial(STUDY, args.seed)
    stages = []
    for name in args.only:
        key, config = VARIANTS[name]
        settings = {"model": MODEL, "width": WIDTH} | plain(config)
        work = partial(train_variant, config, trial)
        stages.append(Stage("recipe", key, work, settings, data=trial.fingerprint))
    return 0 if run(stages, args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
