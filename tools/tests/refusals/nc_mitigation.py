"""What defense_nc refuses where inputs are filtered and models repaired."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tools.tests.refusals.common import IMAGES, LABELS, SIZE, Call, Cases, images, labels, vectors
from tools.tests.refusals.victim import FLAT, MODEL
from torch import Tensor

import defense_nc as nc

SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0])
TRUTHS = torch.tensor([True, True, False, False])
TRIGGER = nc.InvertedTrigger(torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE))
STRIP = nc.Strip(overlays=1)
FILTER = nc.InputFilter()
SMALL = FILTER.calibrate(MODEL, IMAGES, triggers={0: TRIGGER})


def repairs(
    method: nc.Mitigator, triggers: Mapping[int, nc.InvertedTrigger] | None = None
) -> Cases:
    """What every mitigation refuses before it starts."""

    def run(bad: Tensor = IMAGES, truth: Tensor = LABELS, model: Any = MODEL) -> object:
        return method.repair(model, bad, truth, triggers=triggers)

    return {
        **images(run),
        **labels(lambda bad: run(truth=bad)),
        "label above K": lambda _: run(truth=LABELS + 1),
        "one image": lambda _: run(IMAGES[:1], LABELS[:1]),
        "no weights": lambda _: run(model=FLAT),
        "no model": lambda _: run(model=print),
    }


def strip(**changes: Any) -> Call:
    return lambda _: nc.Strip(**changes)


def entropy(bad: Tensor = IMAGES, overlays: Tensor = IMAGES, **more: Any) -> object:
    return nc.strip_entropy(MODEL, bad, overlays, **more)


def ready(threshold: float = 0.5) -> nc.CalibratedDetector:
    return nc.CalibratedDetector("test", threshold, (1, SIZE, SIZE), lambda x: x.mean((1, 2, 3)))


def prune(triggers: Any) -> Call:
    return lambda _: nc.NeuronPruning().repair(MODEL, IMAGES, LABELS, triggers=triggers)


CASES: Mapping[str, Cases] = {
    "CalibratedDetector": {
        **images(ready().score),
        "threshold": lambda _: ready(float("nan")),
        "other size": lambda _: ready().decide(torch.zeros(1, 1, SIZE, SIZE + 1)),
    },
    "threshold_at": {
        **vectors(lambda bad: nc.threshold_at(bad, 0.05), SCORES),
        "rate": lambda _: nc.threshold_at(SCORES, 1.0),
    },
    "auroc": {
        **vectors(lambda bad: nc.auroc(bad, TRUTHS), SCORES),
        "truths shape": lambda _: nc.auroc(SCORES, TRUTHS[:3]),
        "truths dtype": lambda _: nc.auroc(SCORES, TRUTHS.float()),
        "one kind": lambda _: nc.auroc(SCORES, TRUTHS | True),
    },
    "Strip": {
        **images(lambda bad: STRIP.calibrate(MODEL, bad)),
        "overlays": strip(overlays=0),
        "calibration": strip(calibration=0),
        "rate": strip(false_positive_rate=1.0),
        "batch_size": strip(batch_size=0),
        "preset": lambda _: nc.Strip.preset("secret"),
        "few images": lambda _: nc.Strip(overlays=4).calibrate(MODEL, IMAGES),
        "no logits": lambda _: STRIP.calibrate(FLAT, IMAGES),
    },
    "strip_entropy": {
        **images(entropy),
        **{
            f"overlays {kind}": call for kind, call in images(lambda x: entropy(overlays=x)).items()
        },
        "overlays of another size": lambda _: entropy(overlays=torch.zeros(1, 1, SIZE, SIZE + 1)),
        "batch_size": lambda _: entropy(batch_size=0),
        "no logits": lambda _: nc.strip_entropy(FLAT, IMAGES, IMAGES),
    },
    "InputFilter": {
        **images(lambda bad: FILTER.calibrate(MODEL, bad, triggers={0: TRIGGER})),
        "share": lambda _: nc.InputFilter(share=0.0),
        "rate": lambda _: nc.InputFilter(false_positive_rate=1.0),
        "preset": lambda _: nc.InputFilter.preset("secret"),
        "no trigger": lambda _: FILTER.calibrate(MODEL, IMAGES),
        "two triggers": lambda _: FILTER.calibrate(
            MODEL, IMAGES, triggers={0: TRIGGER, 1: TRIGGER}
        ),
        "no linear layer": lambda _: FILTER.calibrate(FLAT, IMAGES, triggers={0: TRIGGER}),
    },
    "DiscriminantFilter": {
        **images(lambda bad: nc.DiscriminantFilter().calibrate(MODEL, bad, triggers={0: TRIGGER})),
        "shrinkage": lambda _: nc.DiscriminantFilter(shrinkage=0.0),
        "rate": lambda _: nc.DiscriminantFilter(false_positive_rate=1.0),
        "preset": lambda _: nc.DiscriminantFilter.preset("secret"),
        "no trigger": lambda _: nc.DiscriminantFilter().calibrate(MODEL, IMAGES),
        "few images": lambda _: nc.DiscriminantFilter().calibrate(
            MODEL, IMAGES, triggers={0: TRIGGER}
        ),
    },
    "ParameterScaling": {
        **images(lambda bad: nc.ParameterScaling().calibrate(MODEL, bad)),
        "scale": lambda _: nc.ParameterScaling(scale=1.0),
        "copies": lambda _: nc.ParameterScaling(copies=0),
        "changed": lambda _: nc.ParameterScaling(changed=1.0),
        "rate": lambda _: nc.ParameterScaling(false_positive_rate=1.0),
        "preset": lambda _: nc.ParameterScaling.preset("secret"),
        "few images": lambda _: nc.ParameterScaling().calibrate(MODEL, IMAGES),
    },
    "LayerRanks": {
        **images(lambda bad: nc.LayerRanks().calibrate(MODEL, bad)),
        "references": lambda _: nc.LayerRanks(references=1),
        "reach": lambda _: nc.LayerRanks(reach=0.0),
        "rate": lambda _: nc.LayerRanks(false_positive_rate=1.0),
        "preset": lambda _: nc.LayerRanks.preset("secret"),
        "few images": lambda _: nc.LayerRanks().calibrate(MODEL, IMAGES),
        "no layers": lambda _: nc.LayerRanks().calibrate(FLAT, IMAGES.repeat(20, 1, 1, 1)),
    },
    "export_filter": {
        **images(lambda bad: nc.export_filter(SMALL, bad, Path("filter.onnx"))),
        "no filter": lambda tmp: nc.export_filter(nc.Strip(), IMAGES, tmp / "f.onnx"),  # type: ignore[arg-type]
        "size": lambda tmp: nc.export_filter(SMALL, IMAGES[..., :-1], tmp / "f.onnx"),
    },
    "NeuronPruning": {
        **repairs(nc.NeuronPruning(), {0: TRIGGER}),
        "cap": lambda _: nc.NeuronPruning(cap=0.0),
        "success_rate": lambda _: nc.NeuronPruning(success_rate=1.0),
        "preset": lambda _: nc.NeuronPruning.preset("secret"),
        "no trigger": prune(None),
        "trigger of no label": prune({3: TRIGGER}),
    },
}
