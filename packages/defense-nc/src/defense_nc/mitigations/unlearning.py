"""Unlearning: fine-tune with reversed triggers and true labels, so that they lose their effect."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.mitigations.common import check_repair, trainable
from defense_nc.mitigations.fine_tune import Sgd, fine_tune, sgd_preset
from defense_nc.protocols import Repaired
from defense_nc.trigger import put_trigger
from wm_inject.core.images import quantize
from wm_inject.core.plan import Trigger


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Fine-tune on clean images of which some carry a reversed trigger and keep their true label.

    Args:
        sgd: How it is trained; augmentation comes after the trigger.
        epochs: Passes over the images, in place of ``sgd.steps``; 0 counts steps.
        trigger_share: Share of the images that carry a trigger, in (0, 1]; drawn anew each pass.
        append: Add the triggered images to the clean ones; in their place if False.
        round_to_pixels: Round triggered images to the 8-bit grid, as a stored attack would be.

    Source: Neural Cleanse, section VI; reverse-generator paper, section 3.5. The first leaves the
        learning rate open, both leave the batch size open.
    """

    name: ClassVar[str] = "unlearning"
    sgd: Sgd = Sgd(lr=0.01)
    epochs: int = 0
    trigger_share: float = 1.0
    append: bool = True
    round_to_pixels: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"expected epochs >= 0, got {self.epochs}")
        if not 0 < self.trigger_share <= 1:
            raise ValueError(f"expected trigger_share in (0, 1], got {self.trigger_share}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> Unlearning:
        """Settings by name, with changes; ``steps`` takes the place of the preset's epochs.

        "paper" is Neural Cleanse's single epoch with the trigger on a fifth of the images; "nc" has
        ten epochs, since a defender's few hundred images make short ones; "reverse" is section 3.5
        of the reverse-generator paper, ten epochs of the clean images and a triggered copy of each;
        "fast" takes as many steps as the other mitigations' presets, and so does "batch-128", whose
        larger batches cost accurate networks less.
        """
        if "steps" in changes:
            changes.setdefault("epochs", 0)
        return sgd_preset(cls, PRESETS, name, **changes)

    def steps(self, images: int) -> int:
        """How many optimiser steps it takes on so many clean images."""
        if not self.epochs:
            return self.sgd.steps
        rows = images + (_triggered(images, self.trigger_share) if self.append else 0)
        full, rest = divmod(rows, self.sgd.batch_size)
        return self.epochs * max(1, full + (rest > 1))  # a last single image joins another batch

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
        """Unlearn all ``triggers`` together, in a copy of ``model``; without any it stays as it is.

        Each triggered image carries one of them, drawn anew each pass. The log holds the labels and
        the loss of each tenth of the steps.

        Raises:
            ValueError: ``triggers`` of None, of a label that the model does not have, or one that
                breaks the image contract.
            DivergedError: The loss became NaN or infinite.
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
        triggered = [put_trigger(triggers[label], images) for label in suspected]
        if self.round_to_pixels:
            triggered = [quantize(part) for part in triggered]
        sgd = replace(self.sgd, steps=self.steps(len(images)))
        passes = self._passes(len(images), len(suspected), torch.Generator().manual_seed(seed))
        losses = fine_tune(
            *(tuned, torch.cat([images, *triggered]), labels.repeat(1 + len(suspected))),
            sgd=sgd,
            seed=seed,
            rows=islice(passes, sgd.steps),
            desc="unlearning",
            progress=progress,
        )
        return Repaired(tuned, {"steps": sgd.steps, "labels": suspected, "losses": losses})

    def _passes(self, count: int, kinds: int, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield from pass_batches(
                count,
                batch_size=self.sgd.batch_size,
                trigger_share=self.trigger_share,
                append=self.append,
                generator=generator,
                kinds=kinds,
            )


_NC = {
    "lr": 0.01,
    "weight_decay": 0.0,
    "schedule": "constant",
    "trigger_share": 0.2,
    "append": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "batch-128": {"batch_size": 128},
    "paper": {"epochs": 1, **_NC},
    "nc": {"epochs": 10, **_NC},
    "reverse": {"epochs": 10, "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
}


def pass_batches(
    count: int,
    *,
    batch_size: int,
    trigger_share: float,
    append: bool,
    generator: torch.Generator,
    kinds: int = 1,
) -> Iterator[Tensor]:
    """The batches of one pass over ``count`` images and triggered copies of them, as row numbers.

    Rows 0 .. count - 1 are the clean images; a block of ``count`` rows follows for each of the
    ``kinds`` of trigger. In a batch the clean rows come first.
    """
    chosen = torch.randperm(count, generator=generator)[: _triggered(count, trigger_share)]
    clean = torch.arange(count)
    if not append:
        clean = clean[~torch.isin(clean, chosen)]
    block = torch.ones_like(chosen)
    if kinds > 1:
        block += torch.randint(kinds, chosen.shape, generator=generator)
    rows = torch.cat([clean, block * count + chosen])
    parts = list(rows[torch.randperm(len(rows), generator=generator)].split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        # Batch normalisation cannot train on a single image.
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        yield torch.cat([part[part < count], part[part >= count]])


def _triggered(count: int, share: float) -> int:
    return max(1, round(share * count))
