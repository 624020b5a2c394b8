"""Why a poisoned classifier is a little less accurate: classifiers that differ in one thing.

For example ``python tools/explain_gap.py docs/studies/cifar10.toml --out results/cifar10-gap``.

The victims of a finished study are trained again with one change each: the same plan with a BadNets
patch instead of the watermark (what the flipped labels cost, whatever the trigger), and clean data
without the images that the plan poisons (what their absence costs).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wm_eval import load_study
from wm_eval.config import StudyConfig, plain
from wm_eval.measure import metrics_values
from wm_eval.robustness import outcomes, summarize
from wm_eval.study import fresh_classifier
from wm_eval.workspace import Made, Workspace
from wm_extract import Identity
from wm_inject import BadNetsTrigger
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import Dataset, load_dataset, train_classifier

VARIANTS = ("badnets", "fewer")


def train_variant(
    config: StudyConfig, data: Dataset, space: Workspace, name: str, at: Path
) -> Made:
    """Train one classifier and count its right answers on the study's test images."""
    model = fresh_classifier(data, config.victim.model, width=config.victim.width, seed=config.seed)
    plan = replace(config.plan, seed=config.seed)
    trigger = BadNetsTrigger(image_size=data.image_size).to(space.device)
    train = data.train
    attack: dict[str, Any] = {}
    if name == "badnets":
        attack = {"plan": plan, "trigger": trigger}
    else:
        train = train.subset(~plan.choose(train.labels))
    train_classifier(
        model,
        train.to(space.device),
        config=replace(config.train, seed=config.seed),
        checkpoint=at,
        device=space.device,
        **attack,
    )
    limit = config.measure.limit
    part = torch.arange(min(limit or len(data.test), len(data.test)))
    found: dict[str, Any] = outcomes(
        model,
        trigger,
        data.test.subset(part).to(space.device),
        target=plan.target,
        corruptions={"none": Identity()},
        seed=config.seed,
    )
    return Made({"n_train": len(train), **metrics_values(summarize(found["none"]))})


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="explain_gap", description=__doc__)
    parser.add_argument("study", type=Path, help="the study's TOML file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS)
    add_common(parser, version="with the workspace")
    parser.set_defaults(seed=None)
    args = parser.parse_args(argv)
    config = load_study(args.study, seed=args.seed)
    data = load_dataset(config.data.name, limit=config.data.limit, seed=config.seed)
    device = str(resolve_device(args.device))
    space = Workspace(args.out, config.seed, data.fingerprint, device, print)
    whole = plain(config)
    settings = {key: whole[key] for key in ("data", "victim", "train", "plan", "measure")}
    for name in args.only:
        space.stage(
            f"victim-{name}", settings, (), partial(train_variant, config, data, space, name)
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
