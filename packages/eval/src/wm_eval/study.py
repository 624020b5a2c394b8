"""What every stage of a study knows, and where it finds what the stages before it have made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import defense_nc
import defense_reverse
from wm_eval.config import StudyConfig
from wm_eval.workspace import Workspace
from wm_extract import Corruption, UNetExtractor, named_corruption
from wm_inject import WatermarkTrigger, load_checkpoint, load_trigger, save_checkpoint
from wm_victim import (
    DATASET_STATS,
    Dataset,
    ImageSet,
    build_classifier,
    defender_subset,
    load_classifier,
)

TRIGGER, EXTRACTOR = "models/trigger.safetensors", "models/extractor.safetensors"


@dataclass(frozen=True)
class Study:
    """What every stage knows."""

    config: StudyConfig
    data: Dataset
    space: Workspace
    progress: bool

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return torch.device(self.space.device)

    @property
    def test(self) -> ImageSet:
        """The test images that are measured on, on the device."""
        test, limit = self.data.test, self.config.measure.limit
        part = test if limit is None else test.subset(torch.arange(min(limit, len(test))))
        return part.to(self.device)

    @property
    def corruptions(self) -> dict[str, Corruption]:
        """Those of the settings, with "none" in front."""
        return {name: named_corruption(name) for name in ("none", *self.config.measure.corruptions)}

    def defender(self, count: int) -> ImageSet:
        """Clean training images of the defender, on the device."""
        count = min(count, len(self.data.train))
        return defender_subset(self.data.train, count=count, seed=self.config.seed).to(self.device)

    def trigger(self) -> WatermarkTrigger:
        """The planted trigger, from its file."""
        trigger = load_trigger(self.space.path(TRIGGER))
        if not isinstance(trigger, WatermarkTrigger):
            raise ValueError(f"expected a watermark trigger in {TRIGGER}, got {type(trigger)}")
        return trigger.to(self.device).eval()

    def extractor(self) -> UNetExtractor:
        """The extractor, from its file."""
        saved = load_checkpoint(self.space.path(EXTRACTOR), kind=UNetExtractor.kind)
        extractor = UNetExtractor(**saved.config)
        extractor.load_state_dict(saved.state)
        return extractor.to(self.device).eval()

    def victim(self, name: str) -> nn.Module:
        """A trained classifier, from its file."""
        return load_classifier(self.space.path(victim_file(name))).to(self.device).eval()


def fresh_classifier(data: Dataset, model: str, *, width: int | None, seed: int) -> nn.Module:
    """An untrained classifier for a data set, with the set's own normalisation where one is known.

    Raises:
        ValueError: An unknown model, or a width or image size that it does not take.
    """
    mean, std = DATASET_STATS.get(data.name, (None, None))
    return build_classifier(
        model,
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        width=width,
        mean=mean,
        std=std,
        seed=seed,
    )


def victim_file(name: str) -> str:
    """Where a victim is kept, inside the study."""
    return f"models/victim-{name}.safetensors"


def reversed_file(defence: str, victim: str) -> str:
    """Where the reversed trigger of a named label is kept, inside the study."""
    return f"models/reversed-{defence}-{victim}.safetensors"


def save_reversed(trigger: nn.Module, path: Path) -> None:
    """Keep a reversed trigger of either defence.

    Raises:
        ValueError: Another kind of trigger.
    """
    if isinstance(trigger, defense_reverse.ReversedTrigger):
        defense_reverse.save_reversed(trigger, path)
    elif isinstance(trigger, defense_nc.InvertedTrigger):
        save_checkpoint(path, kind=trigger.kind, config=trigger.config, state=trigger.state_dict())
    else:
        raise ValueError(f"expected a reversed trigger, got {type(trigger).__name__}")


def load_reversed(path: Path) -> nn.Module:
    """Read what `save_reversed` wrote.

    Raises:
        CheckpointError: Not such a file.
    """
    kinds = (defense_nc.InvertedTrigger.kind, defense_reverse.ReversedTrigger.kind)
    saved = load_checkpoint(path, kind=kinds)
    if saved.kind == defense_reverse.ReversedTrigger.kind:
        return defense_reverse.load_reversed(path)
    numbers = {name: saved.config[name] for name in ("target", "success_rate", "steps")}
    return defense_nc.InvertedTrigger(saved.state["mask"], saved.state["pattern"], **numbers)
