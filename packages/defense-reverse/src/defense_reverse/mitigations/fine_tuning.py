"""Plain fine-tuning: more training on clean images, the control of every other mitigation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from defense_nc.mitigator import Repaired, check_repair
from defense_reverse.mitigations.training import Augmentation, Schedule, preset_of, sgd_of, train
from wm_inject.core.plan import Trigger


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Fine-tune all layers on the clean images. The defaults are the preset "small".

    Args:
        steps: Optimiser steps.
        batch_size: Images per step.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        nesterov: Nesterov's form of the momentum.
        schedule: "constant", "cosine" or "drop"; see `Sgd`.
        augmentation: "none", "crop" or "crop-flip".
        label_smoothing: Share of the wanted answer that is spread over all classes.

    Raises:
        ValueError: A value outside its range.

    Source: the control of Neural Cleanse, NAD and the reverse-generator paper (section 4.3).
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    augmentation: Augmentation = "none"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        sgd_of(self)

    @property
    def name(self) -> str:
        """What it is called in records and tables."""
        return "fine-tuning"

    @classmethod
    def preset(cls, name: str = "small", **changes: Any) -> FineTuning:
        """The settings of this name, small, paper or reverse, with some of them changed.

        "paper" is what BackdoorBench compares with: 100 passes over 2,500 images in batches of 256.
        "reverse" is the control of the reverse-generator paper: ten passes over 2,500 images at a
        constant 1e-3 (the batch of 32 is ours). "small" takes 200 batches of 32 at 0.02
        (ours): a higher rate removes more of a backdoor, and of the accuracy.

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        return preset_of(cls, PRESETS, name, changes)

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Fine-tune a copy of ``model``; ``triggers`` are ignored.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; not changed. Parameters that were frozen
                stay as they are; batch normalisation adapts to the images.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
            labels: int64 ``(N,)``, the true classes.
            triggers: Ignored.
            seed: Seeds the order of the images, augmentation and dropout.
            progress: Show how far it is.

        Returns:
            The new model; the log holds the loss of each tenth of the steps.

        Raises:
            ValueError: Bad images or labels, fewer than two images, or no trainable parameter.
            RuntimeError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        tuned = copy.deepcopy(model)
        losses = train(tuned, images, labels, sgd=sgd_of(self), seed=seed, progress=progress)
        return Repaired(tuned, {"steps": self.steps, "losses": losses})


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {"steps": 1000, "batch_size": 256, "lr": 0.01, "augmentation": "crop-flip"},
    "reverse": {"steps": 790, "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
}
