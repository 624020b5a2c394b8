"""What defense_reverse refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, Call, Table, images, labels
from tools.tests.refusals.inject import checkpoint_files
from tools.tests.refusals.reverse_field import CASES as FIELD
from tools.tests.refusals.victim import FLAT, MODEL
from torch import Tensor, nn

import defense_reverse as dr
from wm_inject import save_checkpoint

SHAPE: dict[str, Any] = {"channels": 1, "width": 2, "depth": 1}
GENERATOR = dr.UNetGenerator(**SHAPE)
TRIGGER = dr.ReversedTrigger(GENERATOR, target=0)
COLOUR = dr.UNetGenerator(channels=3, width=2, depth=1)
CONFIG = dr.ReverseConfig(width=2, depth=1, pretrain_steps=1, steps=1, batch_size=2)


def reverse(bad: Tensor = IMAGES, target: int = 0, model: Any = MODEL, **more: Any) -> object:
    return dr.reverse_engineer(model, bad, target, **{"config": CONFIG, **more})


def scan(bad: Tensor = IMAGES, model: Any = MODEL, **more: Any) -> object:
    return dr.ReverseGenerator(CONFIG).scan(model, bad, progress=False, **more)


def other_weights(tmp: Path) -> object:
    path = tmp / "other.safetensors"
    config = {**TRIGGER.config, "generator": {**SHAPE, "width": 4}}
    save_checkpoint(path, kind=TRIGGER.kind, config=config, state=TRIGGER.state_dict())
    return dr.load_reversed(path)


def config(**changes: Any) -> Call:
    return lambda _: dr.ReverseConfig(**changes)


def generator(**changes: Any) -> Call:
    return lambda _: dr.UNetGenerator(**{**SHAPE, **changes})


TABLE = Table(
    module="defense_reverse",
    cases={
        **FIELD,
        "UNetGenerator": {
            **images(GENERATOR),
            "channels": generator(channels=2),
            "width": generator(width=0),
            "depth": generator(depth=0),
            "convs": generator(convs=0),
            "other channels": lambda _: GENERATOR(IMAGES.repeat(1, 3, 1, 1)),
        },
        "ReversedTrigger": {
            **images(TRIGGER),
            "target": lambda _: dr.ReversedTrigger(GENERATOR, target=-1),
            "success_rate": lambda _: dr.ReversedTrigger(GENERATOR, target=0, success_rate=2.0),
            "residual": lambda _: dr.ReversedTrigger(GENERATOR, target=0, residual_norm=-1.0),
        },
        "pretrain": images(lambda bad: dr.pretrain(bad, config=CONFIG)),
        "reverse_engineer": {
            **images(reverse),
            **labels(lambda bad: reverse(labels=bad)),
            "target": lambda _: reverse(target=3),
            "only the target": lambda _: reverse(labels=torch.zeros(4, dtype=torch.int64)),
            "start": lambda _: reverse(start=COLOUR),
            "no logits": lambda _: reverse(model=FLAT),
            "no model": lambda _: reverse(model=print),
        },
        "ReverseGenerator": {
            **images(scan),
            **labels(lambda bad: scan(labels=bad)),
            "one class": lambda _: scan(labels=torch.zeros(4, dtype=torch.int64)),
            "alpha": lambda _: dr.ReverseGenerator(alpha=1.0),
            "max_ratio": lambda _: dr.ReverseGenerator(max_ratio=0.0),
            "preset": lambda _: dr.ReverseGenerator.preset("secret"),
            "no logits": lambda _: scan(model=FLAT),
            "no model": lambda _: scan(model=print),
        },
        "detection_case": {
            "target": lambda _: dr.detection_case([0], -1),
            "flagged": lambda _: dr.detection_case([-1], 0),
        },
        "save_reversed": {
            "another module": lambda tmp: dr.save_reversed(nn.Identity(), tmp / "t"),  # type: ignore[arg-type]
            "metadata": lambda tmp: dr.save_reversed(TRIGGER, tmp / "t", {"when": object()}),
        },
        "load_reversed": {**checkpoint_files(dr.load_reversed), "other weights": other_weights},
        "ReverseConfig": {
            "width": config(width=0),
            "steps": config(steps=-1),
            "lr": config(lr=0.0),
            "lambdas": config(lambdas=(1.0, 1.0)),
            "negative lambda": config(lambdas=(-1.0, 1.0, 1.0)),
            "success_floor": config(success_floor=0.0),
            "growth": config(growth=1.0),
            "precision": config(precision="float16"),
            "preset": lambda _: dr.ReverseConfig.preset("secret"),
        },
        "LambdaSearch": {
            "start": lambda _: dr.LambdaSearch(-1.0),
            "growth": lambda _: dr.LambdaSearch(1.0, growth=1.0),
            "shrink": lambda _: dr.LambdaSearch(1.0, shrink=0.5),
        },
    },
)
