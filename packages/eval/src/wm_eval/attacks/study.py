"""What every stage of a study of attacks knows, and where it finds what others have made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wm_eval.attacks.config import AttackStudyConfig, Recipe
from wm_eval.attacks.planting import Plantable, Planting, table_attack
from wm_eval.config import plain
from wm_eval.study import fresh_classifier
from wm_eval.workspace import Workspace
from wm_extract import PAPER_CORRUPTIONS, Corruption, RandomCorruption, named_corruption
from wm_inject import load_trigger
from wm_inject.attacks import Length
from wm_victim import Dataset, ImageSet, TrainConfig, load_classifier
from wm_victim.dataset_files import stratified_order

_SUFFIX = ".safetensors"
_TRIGGER = ("name", "profile", "settings", "joint", "weight")


@dataclass(frozen=True)
class AttackStudy:
    """One seed of a study of attacks.

    Args:
        config: The study.
        data: Its images.
        space: Its folder, with the seed.
        progress: Show how far long stages are.
        deadline: A time of `time.monotonic` after which no training epoch starts.
    """

    config: AttackStudyConfig
    data: Dataset
    space: Workspace
    progress: bool = False
    deadline: float | None = None

    @property
    def seed(self) -> int:
        """Of victims, triggers, plans and corruptions alike."""
        return self.space.seed

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return torch.device(self.space.device)

    @property
    def train(self) -> ImageSet:
        """The training images, on the device."""
        return self.data.train.to(self.device)

    def test(self, limit: int | None) -> ImageSet:
        """The first test images, on the device; all for None.

        Of a set that is stored class by class, the first would all be of one class: there they
        are drawn in proportion, the same for every seed.
        """
        test = self.data.test
        if limit is not None:
            order = torch.arange(len(test))
            if bool((test.labels.diff() >= 0).all()):
                order = torch.from_numpy(stratified_order(test.labels.numpy(), seed=0))
            test = test.subset(order[:limit])
        return test.to(self.device)

    @property
    def corruptions(self) -> dict[str, Corruption]:
        """Those of the table, "none" first."""
        names = ("none", *(n for n in self.config.measure.corruptions if n != "none"))
        return {name: named_corruption(name) for name in names}

    def corrupt(self, recipe: Recipe) -> RandomCorruption | None:
        """What a recipe does to training batches: the paper's operations in turn, or nothing."""
        if recipe == "plain":
            return None
        operations = [one for name, one in PAPER_CORRUPTIONS.items() if name != "none"]
        return RandomCorruption(operations, self.config.corruption_probability)

    def recipe(self, *, seed: int | None = None) -> TrainConfig:
        """The training recipe of every victim, with this study's seed unless told otherwise."""
        return replace(self.config.train, seed=self.seed if seed is None else seed)

    @property
    def length(self) -> Length:
        """How long a victim is trained."""
        train = self.config.train
        steps = len(batch_sizes(len(self.data.train), train.batch_size))
        return Length(steps, train.epochs)

    def fresh(self, *, seed: int | None = None) -> nn.Module:
        """An untrained victim."""
        victim = self.config.victim
        seed = self.seed if seed is None else seed
        return fresh_classifier(self.data, victim.model, width=victim.width, seed=seed)

    def attack(self, name: str) -> Plantable:
        """An attack of the table."""
        return table_attack(name, self.config)

    def planned(self) -> dict[str, Any]:
        """What is to be measured: tables tell what is missing from what was never asked for."""
        config = self.config
        asked = {"attacks": config.rows, "recipes": config.recipes, "seeds": config.seeds}
        return {name: list(values) for name, values in asked.items()}

    def described(self, name: str) -> dict[str, Any]:
        """What an attack's trigger depends on, for a record."""
        settings = plain(self.attack(name))
        return {key: settings[key] for key in _TRIGGER if key in settings}

    def planting(self, name: str | None) -> Planting:
        """What a victim's training gets of an attack; nothing for None."""
        if name is None:
            return Planting()
        attack, config = self.attack(name), self.config
        trigger = self.trigger(name)
        plan = attack.plan(
            self.data.train.labels, target=config.target, ratio=config.ratio, seed=self.seed
        )
        hook = attack.hook(trigger, plan, num_classes=self.data.num_classes, length=self.length)
        return Planting(trigger, plan, hook)

    def trigger(self, name: str, recipe: Recipe | None = None) -> nn.Module:
        """A trigger from its file: as fitted, or as it left the training of a victim."""
        took_part = recipe is not None and self.attack(name).mode == "per_batch"
        file = trigger_file(name, self.seed, recipe if took_part else None)
        return load_trigger(self.space.path(file)).to(self.device).eval()

    def victim(self, recipe: Recipe, name: str) -> nn.Module:
        """A trained victim, from its file."""
        path = self.space.path(victim_file(recipe, name, self.seed))
        return load_classifier(path).to(self.device).eval()


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """The batches of one epoch, as the trainer makes them: a last one of one image is left out."""
    full, rest = divmod(images, batch_size)
    return [batch_size] * full + [rest] * (rest > 1 or full == 0)


def trigger_file(attack: str, seed: int, recipe: Recipe | None = None) -> str:
    """Where a trigger is kept in the study; with a recipe, as its victim's training left it."""
    return "models/" + "-".join(filter(None, ("trigger", recipe, attack, str(seed)))) + _SUFFIX


def victim_file(recipe: Recipe, attack: str, seed: int) -> str:
    """Where a victim is kept, inside the study."""
    return f"models/victim-{recipe}-{attack}-{seed}{_SUFFIX}"
