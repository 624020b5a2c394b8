"""What wm_victim refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Table, images, labels, write
from tools.tests.refusals.inject import checkpoint_files
from torch import nn

import wm_victim as wv
from wm_inject import BadNetsTrigger, PoisonPlan

IDS = torch.arange(len(LABELS))
DATA = wv.ImageSet(IMAGES, LABELS, IDS)
PATCH = BadNetsTrigger(image_size=SIZE)
SHAPE: dict[str, Any] = {"num_classes": 3, "channels": 1, "image_size": SIZE, "width": 8}
MODEL = wv.build_classifier("resnet10", **SHAPE).eval()
TWO_CLASSES = wv.build_classifier("resnet10", **{**SHAPE, "num_classes": 2})
CONFIG = wv.TrainConfig(epochs=1, batch_size=2, precision="float32")
FLAT = nn.Flatten(0)  # gives no logits


def sets(call: Callable[[wv.ImageSet], object]) -> dict[str, Call]:
    """Sets that cannot be: the set itself refuses, whoever would have taken it."""
    return {
        **images(lambda bad: call(wv.ImageSet(bad, LABELS, IDS))),
        **labels(lambda bad: call(wv.ImageSet(IMAGES, bad, IDS))),
    }


def build(name: str = "resnet10", **changes: Any) -> Call:
    return lambda _: wv.build_classifier(name, **{**SHAPE, **changes})


def config(**changes: Any) -> Call:
    return lambda _: wv.TrainConfig(**changes)


def train(data: wv.ImageSet = DATA, *, model: nn.Module = MODEL, **more: Any) -> Any:
    return wv.train_classifier(model, data, config=CONFIG, progress=False, **more)


def damaged_npz(tmp: Path) -> Path:
    return write(tmp / "set.npz")


TABLE = Table(
    module="wm_victim",
    cases={
        "ImageSet": {
            **sets(lambda data: data),
            "ids": lambda _: wv.ImageSet(IMAGES, LABELS, IDS[:-1]),
            "ids dtype": lambda _: wv.ImageSet(IMAGES, LABELS, IDS.float()),
            "subset index": lambda _: DATA.subset(torch.tensor([9])),
            "subset mask": lambda _: DATA.subset(torch.tensor([True])),
            "subset of nothing": lambda _: DATA.subset(LABELS > 9),
        },
        "load_dataset": {
            "name": lambda tmp: wv.load_dataset("nothing", root=tmp, download=False),
            "no file": lambda tmp: wv.load_dataset("mnist", root=tmp, download=False),
            "no images": lambda tmp: wv.load_dataset(tmp),
            "no npz": lambda tmp: wv.load_dataset(damaged_npz(tmp)),
            "limit": lambda _: wv.load_dataset("digits", limit=0),
            "image_size": lambda _: wv.load_dataset("digits", image_size=1),
        },
        "defender_subset": {
            **sets(lambda data: wv.defender_subset(data, count=1, seed=0)),
            "both": lambda _: wv.defender_subset(DATA, share=0.5, count=1, seed=0),
            "neither": lambda _: wv.defender_subset(DATA, seed=0),
            "share": lambda _: wv.defender_subset(DATA, share=1.5, seed=0),
            "count": lambda _: wv.defender_subset(DATA, count=9, seed=0),
        },
        "build_classifier": {
            "name": build("nothing"),
            "timm name": build("timm:nothing", width=None),
            "num_classes": build(num_classes=1),
            "channels": build(channels=2),
            "image_size": build(image_size=1),
            "width": build(width=0),
            "mean": build(mean=(0.5, 0.5)),
            "std": build(std=(0.0,)),
        },
        "save_classifier": {
            "another module": lambda tmp: wv.save_classifier(nn.Identity(), tmp / "c"),
            "metadata": lambda tmp: wv.save_classifier(MODEL, tmp / "c", {"when": object()}),
        },
        "load_classifier": checkpoint_files(wv.load_classifier),
        "TrainConfig": {
            "epochs": config(epochs=0),
            "batch_size": config(batch_size=1),
            "lr": config(lr=0.0),
            "momentum": config(momentum=1.0),
            "weight_decay": config(weight_decay=-1.0),
            "schedule": config(schedule="nothing"),
            "augment": config(augment="nothing"),
            "precision": config(precision="float16"),
            "nesterov": config(nesterov=True, momentum=0.0),
            "seed": config(seed=-1),
            "preset": lambda _: wv.TrainConfig.preset("secret"),
        },
        "train_classifier": {
            **sets(train),
            "labels beyond the logits": lambda _: train(model=TWO_CLASSES),
            "plan alone": lambda _: train(plan=PoisonPlan(ratio=0.5)),
            "trigger alone": lambda _: train(trigger=PATCH),
            "per-batch plan": lambda _: train(plan=PoisonPlan(mode="per_batch"), trigger=PATCH),
            "checkpoint": lambda tmp: train(checkpoint=write(tmp / "run")),
        },
        "predict": {
            **images(lambda bad: wv.predict(MODEL, bad)),
            "batch_size": lambda _: wv.predict(MODEL, IMAGES, batch_size=0),
            "no logits": lambda _: wv.predict(FLAT, IMAGES),
        },
        "accuracy": {
            **sets(lambda data: wv.accuracy(MODEL, data)),
            "no logits": lambda _: wv.accuracy(FLAT, DATA),
        },
        "attack_success": {
            **sets(lambda data: wv.attack_success(MODEL, data, PATCH, target=0)),
            "target": lambda _: wv.attack_success(MODEL, DATA, PATCH, target=-1),
            "only the target": lambda _: wv.attack_success(
                MODEL, DATA.subset(LABELS == 0), PATCH, target=0
            ),
        },
    },
    nothing={
        "Dataset": "joins two sets that have checked themselves; load_dataset makes it",
        "TrainHistory": "a result: it records what training did",
    },
)
