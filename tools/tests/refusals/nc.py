"""What defense_nc refuses."""

from __future__ import annotations

from typing import Any

import torch
from tools.tests.refusals import nc_calibration, nc_mitigation
from tools.tests.refusals.common import (
    IMAGES,
    LABELS,
    SIZE,
    Call,
    Table,
    images,
    labels,
    vectors,
    write,
)
from tools.tests.refusals.victim import FLAT, MODEL
from torch import Tensor, nn

import defense_nc as nc

SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
CONFIG = nc.NCConfig(steps=1, batches=1, batch_size=2)
MASK, PATTERN = torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE)
TRIGGER = nc.InvertedTrigger(MASK, PATTERN)


def invert(bad: Tensor = IMAGES, target: int = 0, **more: Any) -> object:
    return nc.invert_trigger(MODEL, bad, target, config=CONFIG, **more)


def invert_all(bad: Tensor = IMAGES, targets: Any = None, **more: Any) -> object:
    return nc.invert_triggers(MODEL, bad, targets, config=CONFIG, **more)


def scan(bad: Tensor = IMAGES, model: nn.Module = MODEL, **more: Any) -> object:
    return nc.NeuralCleanse(CONFIG).scan(model, bad, progress=False, **more)


def unlearn(bad: Tensor = IMAGES, truth: Tensor = LABELS, trigger: Any = TRIGGER) -> object:
    return nc.Unlearning.preset("paper").repair(MODEL, bad, truth, triggers={0: trigger})


def judge(scores: Tensor = SCORES, rates: Tensor | None = None, **more: Any) -> object:
    rates = torch.ones(len(scores)) if rates is None else rates
    return nc.judge("test", scores, rates, **{"floor": 0.9, **more})


def config(**changes: Any) -> Call:
    return lambda _: nc.NCConfig(**changes)


def cleaning(**changes: Any) -> Call:
    return lambda _: nc.Unlearning.preset("nc", **changes)


def sgd(**changes: Any) -> Call:
    return lambda _: nc.Sgd(**changes)


SGD: dict[str, Any] = {
    "steps": 0,
    "batch_size": 1,
    "lr": float("nan"),
    "momentum": 1.0,
    "weight_decay": -1.0,
    "schedule": "nothing",
    "augmentation": "nothing",
    "label_smoothing": 1.0,
}

TABLE = Table(
    module="defense_nc",
    cases={
        **nc_calibration.CASES,
        **nc_mitigation.CASES,
        "mad_index": {
            **vectors(nc.mad_index, SCORES),
            "too few": lambda _: nc.mad_index(SCORES[:1]),
            "side": lambda _: nc.mad_index(SCORES, side="both"),  # type: ignore[arg-type]
            "median": lambda _: nc.mad_index(SCORES, median="high"),  # type: ignore[arg-type]
            "c": lambda _: nc.mad_index(SCORES, c=0.0),
        },
        "outlier_test": {
            **vectors(nc.outlier_test, SCORES),
            "negative": lambda _: nc.outlier_test(-SCORES),
            "alpha": lambda _: nc.outlier_test(SCORES, alpha=0.0),
            "max_ratio": lambda _: nc.outlier_test(SCORES, max_ratio=1.5),
        },
        "judge": {
            **vectors(lambda bad: judge(bad, torch.ones(5)), SCORES),
            "rates shape": lambda _: judge(rates=torch.ones(4)),
            "rates range": lambda _: judge(rates=torch.full((5,), 1.5)),
            "rates dtype": lambda _: judge(rates=torch.ones(5, dtype=torch.int64)),
            "negative": lambda _: judge(-SCORES),
            "floor": lambda _: judge(floor=2.0),
            "alpha": lambda _: judge(alpha=1.0),
            "max_ratio": lambda _: judge(max_ratio=0.0),
        },
        "InvertedTrigger": {
            **images(TRIGGER),
            "mask shape": lambda _: nc.InvertedTrigger(MASK[..., :-1], PATTERN),
            "mask range": lambda _: nc.InvertedTrigger(MASK + 2, PATTERN),
            "pattern shape": lambda _: nc.InvertedTrigger(MASK, PATTERN[0]),
            "pattern range": lambda _: nc.InvertedTrigger(MASK, PATTERN - 1),
            "other size": lambda _: TRIGGER(torch.zeros(1, 1, SIZE, SIZE + 1)),
        },
        "invert_trigger": {
            **images(invert),
            **labels(lambda bad: invert(labels=bad)),
            "target": lambda _: invert(target=3),
            "only the target": lambda _: invert(labels=torch.zeros(4, dtype=torch.int64)),
            "no logits": lambda _: nc.invert_trigger(FLAT, IMAGES, 0, config=CONFIG),
            "no model": lambda _: nc.invert_trigger(print, IMAGES, 0),  # type: ignore[arg-type]
        },
        "invert_triggers": {
            **images(invert_all),
            **labels(lambda bad: invert_all(labels=bad)),
            "no target": lambda _: invert_all(targets=[]),
            "target": lambda _: invert_all(targets=[3]),
            "target twice": lambda _: invert_all(targets=[0, 0]),
            "only the target": lambda _: invert_all(labels=torch.zeros(4, dtype=torch.int64)),
            "no logits": lambda _: nc.invert_triggers(FLAT, IMAGES, config=CONFIG),
            "no model": lambda _: nc.invert_triggers(print, IMAGES),  # type: ignore[arg-type]
            "checkpoint": lambda tmp: invert_all(checkpoint=write(tmp / "run")),
        },
        "NeuralCleanse": {
            **images(scan),
            **labels(lambda bad: scan(labels=bad)),
            "alpha": lambda _: nc.NeuralCleanse(alpha=0.0),
            "max_ratio": lambda _: nc.NeuralCleanse(max_ratio=2.0),
            "preset": lambda _: nc.NeuralCleanse.preset("secret"),
            "no logits": lambda _: scan(model=FLAT),
            "no model": lambda _: scan(model=print),  # type: ignore[arg-type]
        },
        "Unlearning": {
            **images(unlearn),
            **labels(lambda bad: unlearn(truth=bad)),
            "label above K": lambda _: unlearn(truth=LABELS + 1),
            "one image": lambda _: unlearn(IMAGES[:1], LABELS[:1]),
            "trigger's range": lambda _: unlearn(trigger=lambda x, ids: x + 1),
            "trigger's shape": lambda _: unlearn(trigger=lambda x, ids: x[..., :-1]),
            "no triggers": lambda _: nc.Unlearning().repair(MODEL, IMAGES, LABELS),
            "trigger of no label": lambda _: nc.Unlearning().repair(
                MODEL, IMAGES, LABELS, triggers={3: TRIGGER}
            ),
            "epochs": cleaning(epochs=-1),
            "sgd": cleaning(lr=-1.0),
            "trigger_share": cleaning(trigger_share=0.0),
            "preset": lambda _: nc.Unlearning.preset("secret"),
        },
        "NCConfig": {
            "steps": config(steps=0),
            "batch_size": config(batch_size=0),
            "lr": config(lr=0.0),
            "threshold": config(threshold=1.5),
            "floor": config(floor=0.0),
            "multiplier": config(multiplier=1.0),
            "betas": config(betas=(1.0, 0.9)),
            "schedule": config(schedule="nothing"),
            "start": config(starts=("nothing",)),
            "preset": lambda _: nc.NCConfig.preset("secret"),
        },
        "Sgd": {name: sgd(**{name: value}) for name, value in SGD.items()},
        "CostSchedule": {
            "success": lambda _: nc.CostSchedule(CONFIG).update(1.5, 1.0),
            "norm": lambda _: nc.CostSchedule(CONFIG).update(0.5, -1.0),
        },
    },
    nothing={
        **nc_calibration.NOTHING,
        "Detector": "a protocol: the detectors refuse",
        "ScanInputs": "a result: open_scan fills it in",
        "open_scan": "NeuralCleanse refuses through it",
        "AnomalyIndex": "a result: mad_index fills it in",
        "Finding": "a result: a detector fills it in",
        "LabelScore": "a result: judge fills it in from scores that it has checked",
        "ScanReport": "a result: judge fills it in from scores that it has checked",
    },
)
