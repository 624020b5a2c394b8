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

from wm_eval.config import plain
from wm_eval.study import fresh_classifier
from wm_eval.workspace import Made, Workspace
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import Dataset, ImageSet, TrainConfig, accuracy, load_dataset, train_classifier

MODEL, WIDTH, IMAGES, EPOCHS = "resnet18", 16, 20_000, 24
RECIPES = {
    "paper": TrainConfig.preset("paper", epochs=EPOCHS),
    "record": TrainConfig.preset("record", epochs=EPOCHS),
}
VARIANTS = {
    f"{recipe}-{layout}": replace(config, layout=layout)
    for recipe, config in RECIPES.items()
    for layout in ("channels-last", "blocked")
}


def watch(test: ImageSet, _: int, model: nn.Module) -> Mapping[str, float]:
    """The share of test images that get their label."""
    return {"accuracy": accuracy(model, test)}


def train_variant(config: TrainConfig, data: Dataset, space: Workspace, at: Path) -> Made:
    """Train one classifier on clean images."""
    model = fresh_classifier(data, MODEL, width=WIDTH, seed=space.seed)
    history = train_classifier(
        model,
        data.train,
        config=replace(config, seed=space.seed),
        device=space.device,
        checkpoint=at,
        watch=partial(watch, data.test),
    )
    return Made({"n": len(data.test), "watched": list(history.watched)})


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="compare_recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load_dataset("cifar10", limit=IMAGES, seed=args.seed)
    device = str(resolve_device(args.device))
    space = Workspace(args.out, args.seed, data.fingerprint, device, print)
    for name in args.only:
        config = VARIANTS[name]
        settings = {"model": MODEL, "width": WIDTH} | plain(config)
        space.stage(name, settings, (), partial(train_variant, config, data, space))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
