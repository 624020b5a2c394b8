"""Unlearning as a mitigator: fine-tuning with the reversed triggers of all suspected labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.mitigator import Repaired, check_repair, trainable
from defense_nc.unlearn import pass_batches, triggered_copies
from defense_reverse.mitigations.training import Augmentation, Schedule, preset_of, sgd_of, train
from wm_inject.core.plan import Trigger


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Fine-tune on clean images of which some carry a reversed trigger and keep their true label.

    It is `defense_nc.unlearn` counted in steps, for several triggers at once. The defaults are the
    preset "small".

    Args:
        steps: Optimiser steps.
        batch_size: Images per step, clean and triggered together.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        nesterov: Nesterov's form of the momentum.
        schedule: "constant", "cosine" or "drop"; see `Sgd`.
        augmentation: "none", "crop" or "crop-flip", after the trigger.
        label_smoothing: Share of the wanted answer that is spread over all classes.
        trigger_share: Share of the images that carry a trigger, in (0, 1]; drawn anew each pass.
        append: Add the triggered images to the clean ones; in their place if False.
        round_to_pixels: Round triggered images to the 8-bit grid, as a stored attack would be.

    Raises:
        ValueError: A value outside its range.

    Source: Neural Cleanse, section VI; reverse-generator paper, section 3.5.
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    augmentation: Augmentation = "none"
    label_smoothing: float = 0.0
    trigger_share: float = 1.0
    append: bool = True
    round_to_pixels: bool = True

    def __post_init__(self) -> None:
        sgd_of(self)
        if not 0 < self.trigger_share <= 1:
            raise ValueError(f"expected trigger_share in (0, 1], got {self.trigger_share}")

    @property
    def name(self) -> str:
        """What it is called in records and tables."""
        return "unlearning"

    @classmethod
    def preset(cls, name: str = "small", **changes: Any) -> Unlearning:
        """The settings of this name, small, paper or nc, with some of them changed.

        "paper" is the reverse-generator paper's: ten passes over 2,500 clean images and a triggered
        copy of each, at a constant 1e-3 (the batch of 32 is ours). "nc" is Neural Cleanse's: one
        pass over 5,000 images, a fifth of them triggered (rate and batch are ours). "small" has as
        many steps as the other baselines' presets, at 0.01 (ours).

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
        """Unlearn all ``triggers`` together, in a copy of ``model``.

        Each triggered image carries one of them, drawn anew each pass.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; not changed.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
            labels: int64 ``(N,)``, the true classes.
            triggers: The reversed triggers of the suspected labels, by label. If there are none,
                nothing was suspected: the copy stays as it is.
            seed: Seeds the order and choice of images and triggers, augmentation and dropout.
            progress: Show how far it is.

        Returns:
            The new model; the log holds the labels and the loss of each tenth of the steps.

        Raises:
            ValueError: Bad images or labels, fewer than two images, no trainable parameter,
                ``triggers`` of None, a label that the model does not have, or a trigger that breaks
                the image contract.
            RuntimeError: The loss became NaN or infinite.
        """
        num_classes = check_repair(model, images, labels)
        if triggers is None:
            raise ValueError("expected the reversed triggers of the suspected labels, got None")
        if not all(0 <= label < num_classes for label in triggers):
            raise ValueError(
                f"expected triggers of labels in 0 .. {num_classes - 1}, got {[*triggers]}"
            )
        tuned = copy.deepcopy(model).eval()
        if not triggers:
            return Repaired(tuned, {"steps": 0, "labels": [], "losses": []})
        device = trainable(tuned)[0].device
        images, labels = images.to(device), labels.to(device)
        suspected = sorted(triggers)
        rounded = self.round_to_pixels
        stamped = [triggered_copies(triggers[t], images, rounded=rounded) for t in suspected]
        losses = train(
            *(tuned, torch.cat([images, *stamped]), labels.repeat(1 + len(stamped))),
            sgd=sgd_of(self),
            seed=seed,
            rows=self._rows(len(images), len(stamped), torch.Generator().manual_seed(seed)),
            desc="unlearning",
            progress=progress,
        )
        return Repaired(tuned, {"steps": self.steps, "labels": suspected, "losses": losses})

    def _rows(self, count: int, kinds: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The batches of all steps: clean rows come first, then one block of rows a trigger."""

        def passes() -> Iterator[Tensor]:
            while True:
                yield from pass_batches(
                    count,
                    batch_size=self.batch_size,
                    trigger_share=self.trigger_share,
                    append=self.append,
                    generator=generator,
                    kinds=kinds,
                )

        return islice(passes(), self.steps)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {"steps": 1570, "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
    "nc": {
        "steps": 157,
        "lr": 0.01,
        "weight_decay": 0.0,
        "schedule": "constant",
        "trigger_share": 0.2,
        "append": False,
    },
}
