"""The stages of the experiment, one function each; every one reads the files of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc import Unlearning
from defense_reverse import detection_case
from wm_eval.attacks.config import CLEAN
from wm_eval.detectors import DETECTORS
from wm_eval.measure import metrics_values, scan_values
from wm_eval.paper2.config import FINE_TUNING, NAD
from wm_eval.paper2.summary import named
from wm_eval.paper2.trial import Trial
from wm_eval.robustness import outcomes, summarize
from wm_eval.stages import NoTrigger
from wm_eval.study import save_reversed
from wm_eval.workspace import Made
from wm_extract import Identity
from wm_victim import ImageSet


def describe_images(trial: Trial) -> Made:
    """What the images are."""
    data = trial.study.data
    return Made(
        {
            "name": data.name,
            "n_train": len(data.train),
            "n_test": len(data.test),
            "n_measured": len(trial.study.test(trial.config.tested)),
            "num_classes": data.num_classes,
            "channels": data.channels,
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
        }
    )


def measure_victim(trial: Trial, name: str, _: Path) -> Made:
    """Clean accuracy and attack success; of the clean victim, how often it says the target."""
    values = {"attack": name, "target": trial.config.target}
    return Made(values | measured(trial, trial.victim(name), name))


def scan_victim(trial: Trial, name: str, detector: str, checkpoint: Path) -> Made:
    """One detector's look at one victim; the triggers it reversed are kept of the attacked one."""
    config, mine = trial.config, trial.defender()
    report = (
        DETECTORS[detector]
        .preset(config.preset)
        .scan(
            trial.victim(name),
            mine.images,
            labels=mine.labels,
            seed=trial.seed,
            progress=trial.study.progress,
            checkpoint=checkpoint,
        )
    )
    target = None if name == CLEAN else config.target
    values = scan_values(report) | {
        "attack": name,
        "defence": detector,
        "true_target": target,
        "n_images": len(mine),
    }
    if target is None:
        return Made(values)
    values["case"] = detection_case(named(values), target)
    values["paper_case"] = detection_case(report.paper_flagged, target)
    files = []
    for label, trigger in report.triggers.items() if DETECTORS[detector].inverts else ():
        files.append(trial.reversed_file(detector, label))
        save_reversed(trigger, trial.study.space.path(files[-1]))
    return Made(values, files)


def clean_victim(
    trial: Trial, method: str, share: float, rate: float | None, labels: Sequence[int], _: Path
) -> Made:
    """Clean the attacked victim and measure it again.

    Args:
        trial: One seed.
        method: A name out of `DetectConfig.cleaners`.
        share: Of the training images.
        rate: The learning rate, if it is not that of the settings.
        labels: Those that the detector named; nothing is done for none.
    """
    values: dict[str, Any] = {"attack": trial.config.attack, "method": method, "share": share}
    cleaning = trial.config.cleaning
    cleaning = cleaning if rate is None else replace(cleaning, sgd=replace(cleaning.sgd, lr=rate))
    values |= {"lr": cleaning.sgd.lr, "labels": list(labels)}
    if method in DETECTORS and not labels:
        return Made(values | {"done": False, "why": "the scan named no label"})
    mine = trial.defender(share)
    model = trial.victim(trial.config.attack)
    if method == NAD:
        repaired = _nad(trial, model, mine, cleaning)
    else:
        trigger: nn.Module = NoTrigger()
        if method != FINE_TUNING:
            trigger = Alternating([trial.reversed(method, label) for label in labels])
        repaired = cleaning.repair(
            *(model, mine.images, mine.labels),
            triggers={min(labels, default=0): trigger},
            seed=trial.seed,
            progress=trial.study.progress,
        ).model
    values |= {"done": True, "n_images": len(mine), "steps": cleaning.steps(len(mine))}
    return Made(values | {"after": measured(trial, repaired, trial.config.attack)})


def measured(trial: Trial, model: nn.Module, name: str) -> dict[str, Any]:
    """Rates, counts and intervals on test images."""
    study, clean = trial.study, name == CLEAN
    found = outcomes(
        model,
        NoTrigger() if clean else trial.trigger(),
        study.test(trial.config.tested),
        target=trial.config.target,
        corruptions={"none": Identity()},
        seed=trial.seed,
        label_map="all-to-one" if clean else study.attack(name).label_map,
    )
    return metrics_values(summarize(found["none"]))


def _nad(trial: Trial, model: nn.Module, mine: ImageSet, cleaning: Unlearning) -> nn.Module:
    """Attention distillation with the same number of steps and the same learning rate."""
    method = import_module("defense_reverse.mitigations.nad").NAD
    settings = method.preset("fast", steps=cleaning.steps(len(mine)), lr=cleaning.sgd.lr)
    repaired: nn.Module = settings.repair(
        model, mine.images, mine.labels, seed=trial.seed, progress=trial.study.progress
    ).model
    return repaired


class Alternating(nn.Module):
    """Several triggers as one: each image gets one of them, by its id.

    So that unlearning the triggers of two labels takes no more steps than that of one.
    """

    def __init__(self, triggers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.triggers = nn.ModuleList(triggers)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Triggered images; without ids, images are counted from 0."""
        ids = torch.arange(len(images), device=images.device) if ids is None else ids
        out = images.clone()
        for place, trigger in enumerate(self.triggers):
            mine = ids % len(self.triggers) == place
            if bool(mine.any()):
                out[mine] = trigger(images[mine], ids=ids[mine])
        return out


__all__ = [
    "Alternating",
    "clean_victim",
    "describe_images",
    "measure_victim",
    "measured",
    "scan_victim",
]
