"""One victim of a study: what its stages compute with, and where they find what others made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import defense_nc
import defense_reverse
from wm_eval.adaptive import Adaptation, Evasion
from wm_eval.config import Corruptions, DataConfig, Study, WatermarkConfig, plain
from wm_eval.detectors import detector
from wm_eval.engine import Stage
from wm_eval.records import Key, stage_id
from wm_eval.titles import ADAPTIVE, CLEAN, MAPPED, SHIPPED
from wm_extract import (
    PAPER_CORRUPTIONS,
    Corruption,
    RandomCorruption,
    UNetExtractor,
    named_corruption,
)
from wm_inject import load_checkpoint, load_trigger, save_checkpoint
from wm_inject.attacks import ATTACKS, Attack, Length, attack
from wm_victim import (
    DATASET_STATS,
    Dataset,
    ImageSet,
    TrainConfig,
    build_classifier,
    defender_subset,
    load_classifier,
    load_dataset,
)
from wm_victim.attack_setup import AttackSetup
from wm_victim.dataset_files import stratified_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from defense_nc import Detector
    from wm_eval.engine import Result, Store

BLENDED = "equation2"  # the attack that blends the watermark's picture in
MARK = "watermark"
_BATCH = 32  # of the mitigations whose steps are counted in passes


@lru_cache(maxsize=1)
def images_of(config: DataConfig) -> Dataset:
    """The images of a study, loaded once in a process.

    Raises:
        ValueError: They cannot be loaded.
    """
    return load_dataset(
        config.name, classes=config.classes, image_size=config.image_size, limit=config.limit
    )


@dataclass(frozen=True)
class Trial:
    """One victim, by study, seed and attack.

    Args:
        study: With the setting's images, classifier and training, where there are settings.
        seed: Of victim, trigger, plan and corruptions alike.
        attack: A name, or "clean".
        corruptions: What its training images meet.
        setting: The setting of a population.
        split: "calibration" or "test", of a population.
    """

    study: Study
    seed: int
    attack: str = CLEAN
    corruptions: Corruptions = "plain"
    setting: str = ""
    split: str = ""

    @property
    def trigger_key(self) -> dict[str, Any]:
        """Of its trigger."""
        key = {"attack": self.attack, "seed": self.seed}
        return key | ({"setting": self.setting, "split": self.split} if self.setting else {})

    @property
    def victim_key(self) -> dict[str, Any]:
        """Of the victim, and of what is measured on it."""
        return {**self.trigger_key, "corruptions": self.corruptions}

    @property
    def clean(self) -> Trial:
        """The clean victim that was trained in the same way."""
        return replace(self, attack=CLEAN)

    @property
    def surrogate(self) -> Trial:
        """The clean victim that a trigger is searched on: white box."""
        return replace(self, attack=CLEAN, corruptions="plain")

    @property
    def data(self) -> Dataset:
        """The images."""
        return images_of(self.study.data)

    @property
    def fingerprint(self) -> str:
        """Of the images."""
        return self.data.fingerprint

    def stage(
        self,
        kind: str,
        key: Key,
        work: Callable[[Store, Path], Result],
        settings: Mapping[str, Any],
        inputs: Iterable[tuple[str, Key]] = (),
    ) -> Stage:
        """A stage on these images; inputs by kind and key."""
        ids = tuple(stage_id(*each) for each in inputs)
        return Stage(kind, key, work, settings, ids, self.fingerprint)

    def train_images(self, store: Store) -> ImageSet:
        """The training images, on the device."""
        return self.data.train.to(store.device)

    def test_images(self, store: Store, limit: int | None = None) -> ImageSet:
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
        return test.to(store.device)

    @property
    def corrupted_limit(self) -> int | None:
        """How many test images rates under corruptions are measured on; all if None."""
        measure = self.study.measure
        limits = [n for n in (measure.limit, measure.corrupted) if n is not None]
        return min(limits, default=None)

    def defender_images(self, store: Store, fraction: float | None = None) -> ImageSet:
        """The defender's images: those to scan with, or a fraction of the training images."""
        train, defender = self.data.train, self.study.defender
        if fraction is None:
            fraction = defender.fraction
        count = defender.images if fraction is None else self.count(fraction)
        return defender_subset(train, count=min(count, len(train)), seed=self.seed).to(store.device)

    def count(self, fraction: float) -> int:
        """A fraction of the training images; batch normalisation needs two."""
        return max(2, round(fraction * len(self.data.train)))

    def steps(self, fraction: float) -> int:
        """Optimiser steps of every mitigation with a fraction of the images."""
        defender = self.study.defender
        if defender.passes is None:
            return defender.steps
        # Images and as many triggered copies; a last batch of one image joins the one before it.
        full, rest = divmod(2 * self.count(fraction), _BATCH)
        return defender.passes * max(1, full + (rest > 1))

    @property
    def test_corruptions(self) -> dict[str, Corruption]:
        """What test images meet, "none" first."""
        names = dict.fromkeys(("none", *self.study.measure.corruptions))
        return {name: named_corruption(name) for name in names}

    @property
    def train_corruptions(self) -> RandomCorruption | None:
        """What training batches meet: the paper's operations in turn, or nothing."""
        if self.corruptions == "plain":
            return None
        operations = [operation for name, operation in PAPER_CORRUPTIONS.items() if name != "none"]
        return RandomCorruption(operations, self.study.corruption_probability)

    def train_config(self) -> TrainConfig:
        """The training of the attack's victim, with this seed."""
        return replace(self.study.train_of(self.attack), seed=self.seed)

    def fresh(self, seed: int | None = None) -> nn.Module:
        """An untrained classifier, with the data set's own normalisation where one is known."""
        data, victim = self.data, self.study.victim
        mean, std = DATASET_STATS.get(data.name, (None, None))
        return build_classifier(
            victim.model,
            num_classes=data.num_classes,
            channels=data.channels,
            image_size=data.image_size,
            width=victim.width,
            mean=mean,
            std=std,
            seed=self.seed if seed is None else seed,
        )

    @property
    def definition(self) -> Attack:
        """How the attack's trigger is made, which images it poisons, its part in training."""
        study, name = self.study, self.attack
        if name in (MARK, BLENDED, *SHIPPED):
            return replace(ATTACKS[MARK], name=name)
        trigger, label_map = MAPPED.get(name, (ADAPTIVE.get(name, name), None))
        own = {key: x for key, x in self._trigger_settings.items() if key != "ratio"}
        usual = attack(trigger, **{"profile": study.profile, **own})
        if label_map is None:
            return usual
        # Of all images, as each class has a way of its own to learn; or of the source's.
        ratio = {"all-to-all": 0.2, "source-specific": 0.5}[label_map]
        return replace(usual, label_map=label_map, ratio=ratio)

    @property
    def _trigger_settings(self) -> dict[str, Any]:
        """Those of the study for the attack, over those for its trigger."""
        triggers, own = self.study.triggers, ADAPTIVE.get(self.attack, self.attack)
        name = MAPPED.get(own, (own,))[0]
        of_trigger = {key: x for key, x in triggers.get(name, {}).items() if key != "ratio"}
        base = of_trigger if name != self.attack else {}
        return {**base, **triggers.get(self.attack, {})}

    @property
    def adaptation(self) -> Adaptation | None:
        """What the attacker does against detectors; None for one who does not know them."""
        return Adaptation() if self.attack in ADAPTIVE else None

    @property
    def watermark(self) -> WatermarkConfig | None:
        """How a watermark's injector and extractor are made; None for the other attacks."""
        config = self.study.watermark
        if self.attack in SHIPPED:
            return replace(config, pretrained=SHIPPED[self.attack], picture=None)
        return config if self.attack == MARK else None

    @property
    def ratio(self) -> float:
        """The fraction of images that is poisoned; of the target class, for a clean label."""
        usual = None if self.attack in MAPPED else self.study.ratio
        own = self._trigger_settings.get("ratio", usual)
        return float(self.definition.ratio if own is None else own)

    @property
    def label_map(self) -> Any:
        """How poisoned images are labelled."""
        return "all-to-one" if self.attack == CLEAN else self.definition.label_map

    @property
    def described(self) -> dict[str, Any]:
        """What the attack's trigger depends on, for a record."""
        if self.attack == BLENDED:
            return {"name": self.attack, "weight": self.study.watermark.weight}
        if self.watermark is not None:
            watermark = plain(self.watermark)
            made = "joint" if watermark["pretrained"] is None else "pretrained"
            return {"name": self.attack, made: watermark[made], "strength": watermark["strength"]}
        attack = self.definition
        return {"name": self.attack, "profile": attack.profile, "settings": dict(attack.settings)}

    @property
    def training(self) -> dict[str, Any]:
        """What the training of a victim depends on, for a record."""
        study = self.study
        train = plain(self.train_config())
        del train["seed"]  # it is in the key
        return {"victim": plain(study.victim), "train": train, "limit": study.data.limit}

    @property
    def measured(self) -> dict[str, Any]:
        """What rates are measured on, for a record."""
        measure, target = self.study.measure, self.study.target
        fewer = {} if measure.corrupted is None else {"corrupted": measure.corrupted}
        names = list(self.test_corruptions)
        return {"corruptions": names, "limit": measure.limit, **fewer, "target": target}

    def detector(self, name: str) -> Detector:
        """A detector with the study's settings."""
        return detector(name, **{"alpha": self.study.defender.alpha, **self.study.detectors[name]})

    def attack_setup(self, store: Store) -> AttackSetup:
        """What the victim's training gets of the attack; nothing for the clean victim."""
        if self.attack == CLEAN:
            return AttackSetup()
        definition, trigger = self.definition, self.load_trigger(store, fitted=True)
        plan = definition.plan(
            self.data.train.labels, target=self.study.target, ratio=self.ratio, seed=self.seed
        )
        train = self.train_config()
        length = Length(train.steps_per_epoch(len(self.data.train)), train.epochs)
        if self.adaptation is not None:
            return AttackSetup(trigger, plan, Evasion(self.study.target, self.adaptation))
        hook = definition.hook(trigger, plan, num_classes=self.data.num_classes, length=length)
        return AttackSetup(trigger, plan, hook)

    @property
    def trigger_file(self) -> str:
        """Of the trigger as it was fitted."""
        return file_name("trigger", self.trigger_key)

    @property
    def trained_trigger_file(self) -> str:
        """Of the trigger as the training of the victim left it."""
        return file_name("trigger", self.victim_key)

    @property
    def extractor_file(self) -> str:
        """Of the watermark's extractor."""
        return file_name("extractor", self.trigger_key)

    @property
    def victim_file(self) -> str:
        """Of the trained victim."""
        return file_name("victim", self.victim_key)

    def reversed_file(self, detector: str, label: int) -> str:
        """Of the trigger that a detector reversed for a label."""
        return file_name("reversed", {**self.victim_key, "detector": detector, "label": label})

    def load_trigger(self, store: Store, *, fitted: bool = False) -> nn.Module:
        """The trigger: as it left the training of the victim, or as it was fitted."""
        trained = not fitted and self.definition.mode == "per_batch"
        file = self.trained_trigger_file if trained else self.trigger_file
        return load_trigger(store.path(file)).to(store.device).eval()

    def load_extractor(self, store: Store) -> UNetExtractor:
        """The watermark's extractor."""
        saved = load_checkpoint(store.path(self.extractor_file), kind=UNetExtractor.kind)
        extractor = UNetExtractor(**saved.config)
        extractor.load_state_dict(saved.state)
        return extractor.to(store.device).eval()

    def load_victim(self, store: Store) -> nn.Module:
        """The trained victim."""
        return load_classifier(store.path(self.victim_file)).to(store.device).eval()

    def load_reversed(self, store: Store, detector: str, label: int) -> nn.Module:
        """The trigger that a detector reversed for a label."""
        return (
            load_reversed(store.path(self.reversed_file(detector, label))).to(store.device).eval()
        )


def file_name(kind: str, key: Key, suffix: str = "safetensors") -> str:
    """Where a stage keeps a file inside the study: the kind and the values of its key."""
    words = (word.rpartition("=")[2] for word in stage_id(kind, key).split(" "))
    return f"models/{'-'.join(words)}.{suffix}"


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """The batches of one epoch, as the trainer makes them: a last one of one image is left out."""
    full, rest = divmod(images, batch_size)
    return [batch_size] * full + [rest] * (rest > 1 or full == 0)


def save_reversed(trigger: nn.Module, path: Path) -> None:
    """Keep a reversed trigger of any defence.

    Raises:
        ValueError: Another kind of trigger.
    """
    if isinstance(trigger, defense_reverse.ReversedTrigger):
        defense_reverse.save_reversed(trigger, path)
    elif isinstance(
        trigger,
        defense_nc.InvertedTrigger | defense_reverse.UniversalPicture | defense_reverse.WarpField,
    ):
        save_checkpoint(path, kind=trigger.kind, config=trigger.config, state=trigger.state_dict())
    else:
        raise ValueError(f"expected a reversed trigger, got {type(trigger).__name__}")


def load_reversed(path: Path) -> nn.Module:
    """Read what `save_reversed` wrote.

    Raises:
        CheckpointError: Not such a file.
    """
    picture, warp = defense_reverse.UniversalPicture.kind, defense_reverse.WarpField.kind
    kinds = (defense_nc.InvertedTrigger.kind, defense_reverse.ReversedTrigger.kind, picture, warp)
    saved = load_checkpoint(path, kind=kinds)
    if saved.kind == defense_reverse.ReversedTrigger.kind:
        return defense_reverse.load_reversed(path)
    if saved.kind == picture:
        return defense_reverse.UniversalPicture(saved.state["picture"])
    if saved.kind == warp:
        return defense_reverse.WarpField(saved.state["field"])
    numbers = {name: saved.config[name] for name in ("target", "success_rate", "steps")}
    return defense_nc.InvertedTrigger(saved.state["mask"], saved.state["pattern"], **numbers)
