"""What a study of attacks is made of: images, one recipe for every victim, attacks and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_extract import JointConfig
from wm_inject.attacks import PROFILES, Profile, list_attacks
from wm_victim import TrainConfig

# The order of the table: the baselines, then the watermark and the plain blend of its picture.
TABLE = (*list_attacks(), "watermark", "equation2")
CLEAN = "clean"
Recipe = Literal["plain", "corrupted"]
RECIPES: tuple[Recipe, ...] = ("plain", "corrupted")


@dataclass(frozen=True)
class AttackStudyConfig:
    """A study of attacks: every one meets the same images, victim and training.

    Args:
        name: Of the study, for its records.
        profile: How much fitting a trigger may cost: "tiny", "small" or "paper".
        data: The images. Which of them ``limit`` keeps does not depend on a seed.
        victim: The classifier.
        train: Its training, the same for every attack; the seed inside it plays no role.
        attacks: Names out of `TABLE`; they are run in its order. The clean victim comes by itself.
        seeds: One whole table each; the figures are summed up over them.
        recipes: "plain" trains victims as they are; "corrupted" applies the corruptions of the
            table to training batches, each with ``corruption_probability``.
        corruption_probability: For "corrupted", in (0, 1].
        target: The label that the attacks ask for.
        ratio: Share of poisoned images; each attack's own if None.
        settings: By attack, settings of its trigger that differ from its own.
        joint: Training of the watermark's injector and extractor.
        weight: lambda of equation 2, the share of the watermark's picture, in (0, 1].
        measure: Corruptions, how many test images a cell is measured on, pictures in the figure.
        stealth_images: Test images that the stealth figures are means of.
        watched_images: Test images on which a victim is watched while it trains.

    Raises:
        ValueError: An unknown attack or recipe, no attack, recipe or seed, or a value out of range.
    """

    name: str = "attacks"
    profile: Profile = "small"
    data: DataConfig = field(default_factory=DataConfig)
    victim: VictimConfig = field(default_factory=VictimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    attacks: tuple[str, ...] = TABLE
    seeds: tuple[int, ...] = (0,)
    recipes: tuple[Recipe, ...] = ("plain",)
    corruption_probability: float = 0.3
    target: int = 0
    ratio: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    joint: JointConfig = field(default_factory=JointConfig)
    weight: float = 0.2
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    stealth_images: int = 1000
    watched_images: int = 500

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"expected a profile in {', '.join(PROFILES)}, got {self.profile!r}")
        _check_names("attacks", self.attacks, (CLEAN, *TABLE))
        _check_names("recipes", self.recipes, RECIPES)
        _check_names("settings", self.settings or ("watermark",), TABLE)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"expected different seeds >= 0, at least one, got {self.seeds}")
        for name in ("corruption_probability", "weight"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {getattr(self, name)}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"expected a poison ratio in (0, 1], got {self.ratio}")
        if self.target < 0:
            raise ValueError(f"expected a target label >= 0, got {self.target}")
        for name in ("stealth_images", "watched_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")

    @property
    def rows(self) -> tuple[str, ...]:
        """The attacks in the order of the table, without the clean victim."""
        return tuple(name for name in TABLE if name in self.attacks)


def _check_names(what: str, names: Any, known: tuple[str, ...]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"expected {what} out of {', '.join(known)}, got {got}")
