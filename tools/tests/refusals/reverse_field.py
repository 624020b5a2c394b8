"""What defense_reverse refuses in what the field cleans and detects with, and in closeness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Cases, images, labels
from tools.tests.refusals.nc_mitigation import TRIGGER, repairs
from tools.tests.refusals.victim import MODEL
from torch import Tensor, nn

import defense_reverse as dr
from defense_nc import Mitigator

NO_STAGES = nn.Sequential(nn.Flatten(), nn.Linear(IMAGES[0].numel(), 3))
MASK = torch.zeros(8)


def refusals(method: Mitigator, **settings: Any) -> Cases:
    """What a mitigation refuses: bad input, another preset, and each of these settings."""

    def change(name: str, value: Any) -> Call:
        return lambda _: replace(method, **{name: value})  # type: ignore[type-var]

    return {
        **repairs(method),
        **{name: change(name, value) for name, value in settings.items()},
        "preset": lambda _: type(method).preset("secret"),  # type: ignore[attr-defined]
    }


def without_stages(method: Mitigator) -> Call:
    return lambda _: method.repair(NO_STAGES, IMAGES, LABELS)


def detector(method: Any) -> Cases:
    """What a detector in feature space refuses."""

    def scan(bad: Tensor = IMAGES, model: Any = MODEL, **more: Any) -> object:
        return method.scan(model, bad, progress=False, **more)

    return {
        **images(scan),
        **labels(lambda bad: scan(labels=bad)),
        "one class": lambda _: scan(labels=torch.zeros_like(LABELS)),
        "no features": lambda _: scan(model=NO_STAGES),
        "alpha": lambda _: replace(method, alpha=0.0),
        "preset": lambda _: type(method).preset("secret"),
    }


def trigger(mask: Tensor = MASK, **more: Any) -> dr.FeatureTrigger:
    generator = dr.UNetGenerator(channels=1, width=2, depth=1)
    return dr.FeatureTrigger(generator, mask, **{"target": 0, **more})


def compare(bad: Tensor = IMAGES, ours: Any = TRIGGER, truth: Any = TRIGGER) -> object:
    return dr.compare_triggers(ours, truth, bad)


def smaller(images: Tensor, **_: Any) -> Tensor:
    return images[..., :-1]


CASES: Mapping[str, Cases] = {
    "FineTuning": refusals(dr.FineTuning()),
    "FTSAM": refusals(dr.FTSAM(), rho=-1.0),
    "ChannelLipschitzPruning": {
        **refusals(dr.ChannelLipschitzPruning(), deviations=0.0),
        "no convolutions": without_stages(dr.ChannelLipschitzPruning()),
    },
    "FeatureShiftTuning": refusals(dr.FeatureShiftTuning(), shift=-1.0),
    "HeadUnlearning": {
        **refusals(dr.HeadUnlearning(), reach=0.0, penalty=-1.0, most=1),
        "no labels": lambda _: dr.HeadUnlearning().repair(MODEL, IMAGES, LABELS),
        "unknown label": lambda _: dr.HeadUnlearning().repair(
            MODEL, IMAGES, LABELS, triggers={99: TRIGGER}
        ),
    },
    "NAD": {
        **refusals(dr.NAD(), teacher_share=1.0, power=0.0, betas=(), layers=("head",)),
        "no maps": without_stages(dr.NAD()),
    },
    "FinePruning": {
        **refusals(dr.FinePruning(), tolerance=1.0, prune_step=0.0, validation_share=0.0),
        "layer": lambda _: dr.FinePruning(layer="nothing").repair(MODEL, IMAGES, LABELS),
        "no maps": without_stages(dr.FinePruning()),
    },
    "ANP": {
        **refusals(
            dr.ANP(),
            steps=0,
            batch_size=1,
            lr=0.0,
            momentum=1.0,
            noise=2.0,
            noise_steps=0,
            clean_weight=-1.0,
            holdout=1.0,
            tolerance=1.0,
        ),
        "few images": lambda _: dr.ANP().repair(MODEL, IMAGES[:3], LABELS[:3]),
        "no normalisation": without_stages(dr.ANP()),
    },
    "IBAU": refusals(
        dr.IBAU(),
        steps=0,
        batch_size=1,
        rounds=0,
        lr=0.0,
        search_steps=0,
        search_lr=0.0,
        inner_batch=0,
        inner_lr=0.0,
        iterations=0,
        radius=0.0,
        penalty=-1.0,
        share=0.0,
    ),
    "FeatureRE": detector(dr.FeatureRE.preset(width=2, depth=1, steps=1)),
    "UniversalPerturbation": {
        **{
            k: v
            for k, v in detector(dr.UniversalPerturbation(steps=1)).items()
            if k != "no features"
        },
        "steps": lambda _: dr.UniversalPerturbation(steps=0),
        "start": lambda _: dr.UniversalPerturbation(start=0.0),
        "floor": lambda _: dr.UniversalPerturbation(floor=0.0),
    },
    "PairPerturbation": {
        **{
            k: v
            for k, v in detector(dr.PairPerturbation(steps=1, map_steps=1)).items()
            if k != "no features"
        },
        "steps": lambda _: dr.PairPerturbation(steps=0),
        "start": lambda _: dr.PairPerturbation(start=0.0),
        "map_floor": lambda _: dr.PairPerturbation(map_floor=0.0),
    },
    "UniversalPicture": {
        **images(dr.UniversalPicture(torch.zeros(1, SIZE, SIZE))),
        "no picture": lambda _: dr.UniversalPicture(IMAGES),
        "other size": lambda _: dr.UniversalPicture(torch.zeros(1, 4, 4))(IMAGES),
    },
    "UniversalWarp": {
        **{k: v for k, v in detector(dr.UniversalWarp(steps=1)).items() if k != "no features"},
        "steps": lambda _: dr.UniversalWarp(steps=0),
        "grid": lambda _: dr.UniversalWarp(grid=1),
        "size": lambda _: dr.UniversalWarp(size=0.0),
        "works": lambda _: dr.UniversalWarp(works=1.1),
    },
    "WarpField": {
        **images(dr.WarpField(torch.zeros(2, 4, 4))),
        "no field": lambda _: dr.WarpField(IMAGES),
    },
    "PatchSweep": {
        **{k: v for k, v in detector(dr.PatchSweep(places=1)).items() if k != "no features"},
        "places": lambda _: dr.PatchSweep(places=0),
        "sides": lambda _: dr.PatchSweep(sides=(0.6,)),
        "works": lambda _: dr.PatchSweep(works=1.1),
        "no sides": lambda _: dr.PatchSweep(sides=()),
    },
    "HeadWeights": {
        **{k: v for k, v in detector(dr.HeadWeights()).items() if k != "no features"},
        "most": lambda _: dr.HeadWeights(most=0),
        "least": lambda _: dr.HeadWeights(least=51),
        "no head": lambda _: dr.HeadWeights().scan(torch.nn.Flatten(), IMAGES, labels=LABELS),
    },
    "MarginAscent": {
        **{k: v for k, v in detector(dr.MarginAscent(steps=1)).items() if k != "no features"},
        "starts": lambda _: dr.MarginAscent(starts=0),
        "lr": lambda _: dr.MarginAscent(lr=0.0),
    },
    "BtiDbf": detector(dr.BtiDbf.preset(width=2, depth=1, steps=1)),
    "BtiDbfUnlearning": {
        **refusals(
            dr.BtiDbfUnlearning(), rounds=0, steps=1, batch_size=1, lr=0.0, trigger_share=0.0
        ),
        "one class": lambda _: dr.BtiDbfUnlearning().repair(
            MODEL, IMAGES, torch.zeros_like(LABELS)
        ),
        "no features": without_stages(dr.BtiDbfUnlearning()),
    },
    "BtiDbfConfig": {
        "width": lambda _: dr.BtiDbfConfig(width=0),
        "steps": lambda _: dr.BtiDbfConfig(steps=0),
        "lr": lambda _: dr.BtiDbfConfig(lr=0.0),
        "image_bound": lambda _: dr.BtiDbfConfig(image_bound=0.0),
        "noise": lambda _: dr.BtiDbfConfig(noise=-1.0),
        "min_share": lambda _: dr.BtiDbfConfig(min_share=0.0),
        "preset": lambda _: dr.BtiDbfConfig.preset("secret"),
    },
    "FeatureREConfig": {
        "width": lambda _: dr.FeatureREConfig(width=0),
        "steps": lambda _: dr.FeatureREConfig(steps=0),
        "warmup_steps": lambda _: dr.FeatureREConfig(warmup_steps=-1),
        "batch_size": lambda _: dr.FeatureREConfig(batch_size=1),
        "lr": lambda _: dr.FeatureREConfig(lr=0.0),
        "betas": lambda _: dr.FeatureREConfig(betas=(1.0, 0.9)),
        "mask_share": lambda _: dr.FeatureREConfig(mask_share=0.0),
        "threshold": lambda _: dr.FeatureREConfig(threshold=1.0),
        "preset": lambda _: dr.FeatureREConfig.preset("secret"),
    },
    "FeatureTrigger": {
        **images(trigger()),
        "target": lambda _: trigger(target=-1),
        "success_rate": lambda _: trigger(success_rate=2.0),
        "residual": lambda _: trigger(residual_norm=-1.0),
        "mask": lambda _: trigger(MASK - 1),
        "other channels": lambda _: trigger()(IMAGES.repeat(1, 3, 1, 1)),
    },
    "compare_triggers": {
        **images(compare),
        "one image": lambda _: compare(IMAGES[:1]),
        "shape of the reversed": lambda _: compare(ours=smaller),
        "shape of the true": lambda _: compare(truth=smaller),
    },
}
