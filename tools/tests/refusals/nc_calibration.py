"""What defense_nc refuses where verdicts are calibrated and repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, Call, Cases, images, vectors
from tools.tests.refusals.victim import FLAT, MODEL
from torch import Tensor

import defense_nc as nc

SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
SUBJECT = nc.ModelInfo(5, 32, 3, "convolutional", 100)
LOGS = (1.0, 1.1, 0.9, 1.2, 0.8)
MODELS = tuple(
    nc.CleanModel(tuple(x + i / 10 for x in LOGS), SUBJECT, "made up", "none") for i in range(6)
)
CALIBRATION = nc.fit_calibration(MODELS, detector="test", preset="fast")
REPORT = nc.judge("test", SCORES, torch.ones(5), floor=0.9)


def subject(**changes: Any) -> Call:
    return lambda _: replace(SUBJECT, **changes)


def calibration(**changes: Any) -> Call:
    return lambda _: replace(CALIBRATION, **changes)


def clean(scores: Tensor = SCORES, rates: Tensor | None = None, floor: float = 0.9) -> object:
    rates = torch.ones(len(scores)) if rates is None else rates
    return nc.clean_model(scores, rates, floor=floor, subject=SUBJECT, dataset="none", arch="none")


def fit(*models: nc.CleanModel) -> object:
    return nc.fit_calibration(models, detector="test", preset="fast")


def judge_scan(
    bad: Tensor = IMAGES, scores: Tensor = SCORES, rates: Tensor | None = None, **more: Any
) -> object:
    rates = torch.ones(5) if rates is None else rates
    settings = {"model": MODEL, "images": bad, "settings": {}, "floor": 0.9, **more}
    return nc.judge_scan("test", scores, rates, **settings)


def repeat(**changes: Any) -> Call:
    return lambda _: nc.scan_until_stable(lambda seed: REPORT, **changes)


CASES: Mapping[str, Cases] = {
    "ModelInfo": {
        "classes": subject(classes=1),
        "image_size": subject(image_size=0),
        "channels": subject(channels=0),
        "network": subject(network="nothing"),
        "images": subject(images=0),
    },
    "describe_model": {
        **images(lambda bad: nc.describe_model(MODEL, bad)),
        "classes": lambda _: nc.describe_model(MODEL, IMAGES, classes=1),
        "no logits": lambda _: nc.describe_model(FLAT, IMAGES),
    },
    "Calibration": {
        "sigma0": calibration(sigma0=0.0),
        "nu0": calibration(nu0=float("nan")),
        "tail": calibration(tail=CALIBRATION.tail._replace(share=1.5)),
        "models": calibration(models=MODELS[:4]),
        "fields": lambda _: nc.Calibration.from_dict({"sigma0": 1.0}),
    },
    "CleanModel": {
        "labels missing": lambda _: replace(MODELS[0], labels=(0, 1)),
        "label range": lambda _: replace(MODELS[0], labels=(0, 1, 2, 3, 5)),
        "labels twice": lambda _: replace(MODELS[0], labels=(0, 1, 2, 3, 3)),
        "idle": lambda _: replace(MODELS[0], labels=(0, 1, 2, 3, 4), idle=(5,)),
    },
    "clean_model": {
        **vectors(lambda bad: clean(bad, torch.ones(5)), SCORES),
        "rates shape": lambda _: clean(rates=torch.ones(4)),
        "rates range": lambda _: clean(rates=torch.full((5,), 1.5)),
        "negative": lambda _: clean(-SCORES),
        "floor": lambda _: clean(floor=2.0),
    },
    "fit_calibration": {
        "few models": lambda _: fit(*MODELS[:4]),
        "few labels": lambda _: fit(*MODELS[1:], replace(MODELS[0], log_scores=LOGS[:1])),
        "nan": lambda _: fit(*MODELS[1:], replace(MODELS[0], log_scores=(float("nan"),) * 5)),
    },
    "judge_scan": {
        **images(judge_scan),
        **{
            f"scores {kind}": call
            for kind, call in vectors(lambda bad: judge_scan(scores=bad), SCORES).items()
        },
        "rates range": lambda _: judge_scan(rates=torch.full((5,), 1.5)),
        "floor": lambda _: judge_scan(floor=2.0),
        "alpha": lambda _: judge_scan(alpha=1.0),
        "max_ratio": lambda _: judge_scan(max_ratio=0.0),
    },
    "combine": {
        "no report": lambda _: nc.combine([]),
        "another detector": lambda _: nc.combine([REPORT, replace(REPORT, detector="other")]),
        "another alpha": lambda _: nc.combine([REPORT, replace(REPORT, alpha=0.1)]),
        "other labels": lambda _: nc.combine([REPORT, replace(REPORT, labels=REPORT.labels[1:])]),
    },
    "scan_until_stable": {
        "seed": repeat(seed=-1),
        "max_repeats": repeat(max_repeats=2),
        "agree": repeat(agree=1),
        "margin": repeat(margin=0.5),
    },
}
NOTHING = {
    "load_calibration": "looks one up by name and settings, and gives None where none is shipped",
    "refit": "takes a calibration, and that has checked itself",
}
