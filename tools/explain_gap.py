"""Why a poisoned classifier is a little less accurate: classifiers that differ in one thing.

For example ``python tools/explain_gap.py cifar10 --out results/cifar10-gap``.

The victims of a study are trained again with one change each: the same plan with a BadNets patch
instead of the watermark (what the flipped labels cost, whatever the trigger), and clean data
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

from wm_eval.config import load_study, plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.measure import metrics_values
from wm_eval.robustness import outcomes, summarize
from wm_eval.trial import Trial
from wm_extract import Identity
from wm_inject import BadNetsTrigger, PoisonPlan
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import train_classifier

VARIANTS = ("badnets", "fewer")


def train_variant(trial: Trial, name: str, store: Store, checkpoint: Path) -> Result:
    """Train one classifier and count its right answers on the study's test images."""
    study, data, seed = trial.study, trial.data, trial.seed
    plan = PoisonPlan(ratio=study.ratio or 0.1, target=study.target, seed=seed)
    trigger = BadNetsTrigger(image_size=data.image_size).to(store.device)
    train, model = data.train, trial.fresh()
    attack: dict[str, Any] = {}
    if name == "badnets":
        attack = {"plan": plan, "trigger": trigger}
    else:
        train = train.subset(~plan.choose(train.labels))
    train_classifier(
        model,
        train.to(store.device),
        config=replace(study.train, seed=seed),
        checkpoint=checkpoint,
        device=torch.device(store.device),
        **attack,
    )
    rows: dict[str, Any] = outcomes(
        model,
        trigger,
        trial.test_images(store, study.measure.limit),
        target=study.target,
        corruptions={"none": Identity()},
        seed=seed,
    )
    return Result({"n_train": len(train), **metrics_values(summarize(rows["none"]))})


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="explain_gap", description=__doc__)
    parser.add_argument("study", help="the name of a study that ships, or a TOML file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS)
    add_common(parser, version="with the workspace")
    parser.set_defaults(seed=None)
    args = parser.parse_args(argv)
    study = load_study(args.study, seed=args.seed)
    trial = Trial(study, study.seeds[0])
    whole = plain(study)
    settings = {key: whole[key] for key in ("data", "victim", "train", "ratio", "measure")}
    stages = [
        Stage(
            "rates",
            {"variant": name},
            partial(train_variant, trial, name),
            settings,
            data=trial.fingerprint,
        )
        for name in args.only
    ]
    return 0 if run(stages, args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
