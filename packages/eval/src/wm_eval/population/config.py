"""What a population is made of: worlds of data and network, and how many models of each kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wm_eval.attacks.config import CLEAN, TABLE, AttackStudyConfig
from wm_eval.attacks.profiles import attack_profile
from wm_eval.config import DataConfig, VictimConfig
from wm_eval.detectors import detector
from wm_inject.attacks import PROFILES, Profile
from wm_victim import TrainConfig

Half = Literal["calibration", "test"]
HALVES: tuple[Half, ...] = ("calibration", "test")
TEST_SEEDS = 1000  # seeds of the test half start here: no seed is ever in both halves
EVERYWHERE = "all"  # what tables call all worlds together
_WORLD = re.compile(r"[a-z0-9][a-z0-9._-]*")  # a folder of its own, one level deep


@dataclass(frozen=True)
class World:
    """One data set, one network and one recipe, and how many models of it there are.

    Args:
        study: Images, classifier and training; its seeds and target are not used.
        calibration: Attack (or "clean") to the number of models that may choose thresholds.
        test: Attack (or "clean") to the number of models that figures come from.
        ratios: Attack to its share of poisoned images; the attack's own if it is not here.
        profiles: Attack to how much fitting its trigger may cost; the study's if it is not here.

    Raises:
        ValueError: An unknown attack or profile, a count below zero or above 1,000 (the seeds of
            the halves would meet), or a ratio outside (0, 1].
    """

    study: AttackStudyConfig
    calibration: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for counts in (self.calibration, self.test):
            unknown = sorted(set(counts) - {CLEAN, *TABLE})
            if unknown:
                known = ", ".join((CLEAN, *TABLE))
                raise ValueError(f"expected attacks out of {known}, got {unknown[0]!r}")
            if any(not isinstance(n, int) or not 0 <= n <= TEST_SEEDS for n in counts.values()):
                raise ValueError(f"expected counts in 0 .. {TEST_SEEDS}, got {dict(counts)}")
        for name, ratio in self.ratios.items():
            if name not in TABLE or not 0 < ratio <= 1:
                raise ValueError(f"expected ratios in (0, 1] of attacks, got {dict(self.ratios)}")
        for name, profile in self.profiles.items():
            if name not in TABLE or profile not in PROFILES:
                raise ValueError(
                    f"expected profiles out of {', '.join(PROFILES)} of attacks, "
                    f"got {dict(self.profiles)}"
                )

    def models(self, half: Half) -> tuple[tuple[str, int], ...]:
        """Attack and seed of every model of a half; clean ones first, as others may need them."""
        counts = self.calibration if half == "calibration" else self.test
        first = 0 if half == "calibration" else TEST_SEEDS
        names = sorted(counts, key=lambda name: (name != CLEAN, name))
        return tuple((name, first + i) for name in names for i in range(counts[name]))

    def study_of(self, attack: str, seed: int, *, num_classes: int) -> AttackStudyConfig:
        """The study of one model. Every seed has a target of its own: no label is special."""
        return replace(
            self.study,
            seeds=(seed,),
            target=seed % num_classes,
            ratio=self.ratios.get(attack, self.study.ratio),
            profile=self.profiles.get(attack, self.study.profile),
        )


@dataclass(frozen=True)
class PopulationConfig:
    """A population of small classifiers, and the detectors that look at every one of them.

    Args:
        worlds: By name, in lower case: each is a folder.
        detectors: Names of `wm_eval.detectors.DETECTORS`, each with the preset it runs with.
        images: Clean images of the defender, for every scan.
        floor: Attack success below which a backdoored model is counted but not judged, in (0, 1].
        alpha: Share of clean models that may be called backdoored, in (0, 1).

    Raises:
        ValueError: No world or detector, a name that no folder should have, an unknown detector or
            preset, or a value outside its range.
    """

    worlds: Mapping[str, World]
    detectors: Mapping[str, str] = field(default_factory=lambda: {"nc": "fast", "reverse": "fast"})
    images: int = 500
    floor: float = 0.9
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not self.worlds or not self.detectors:
            raise ValueError("expected at least one world and one detector")
        for name in self.worlds:
            if not _WORLD.fullmatch(name) or name == EVERYWHERE:
                raise ValueError(f"expected lower-case names of worlds, got {name!r}")
        for name, preset in self.detectors.items():
            detector(name, preset)
        if self.images < 2:
            raise ValueError(f"expected at least 2 images, got {self.images}")
        check_rates(floor=self.floor, alpha=self.alpha)


def check_rates(*, floor: float, alpha: float) -> None:
    """Check the floor of attack success and the share of false alarms.

    Raises:
        ValueError: A floor outside (0, 1] or an alpha outside (0, 1).
    """
    if not 0 < floor <= 1 or not 0 < alpha < 1:
        raise ValueError(f"expected floor in (0, 1] and alpha in (0, 1), got {floor}, {alpha}")


def population_profile(
    profile: Literal["tiny", "small"] = "small", **changes: Any
) -> PopulationConfig:
    """A population that ships, with changes.

    Args:
        profile: "tiny" (bundled digits, a look at all of it in minutes) or "small" (two data sets
            by two networks; the one that the shipped calibration comes from).
        changes: Fields of `PopulationConfig` to set otherwise.

    Raises:
        ValueError: No such profile, or changes that do not fit.
    """
    if profile not in _WORLDS:
        raise ValueError(f"expected a profile in {', '.join(_WORLDS)}, got {profile!r}")
    worlds = _WORLDS[profile]()
    try:
        return PopulationConfig(**{"worlds": worlds, **changes})
    except TypeError as error:
        raise ValueError(f"expected fields of PopulationConfig: {error}") from error


def _study(data: DataConfig, model: str, width: int, train: TrainConfig) -> AttackStudyConfig:
    start = attack_profile("tiny", data.name, victim=VictimConfig(model, width), train=train)
    return replace(start, data=data, watched_images=1000)


def _tiny() -> dict[str, World]:
    digits, train = DataConfig("digits"), TrainConfig.preset("fast", epochs=4)
    return {
        "digits-plain": World(
            _study(digits, "wanet-mnist", 32, replace(train, lr=0.01)),
            {CLEAN: 4},
            {CLEAN: 4, "badnets": 2, "blend": 2},
        ),
        "digits-residual": World(
            _study(digits, "resnet10", 8, train), {CLEAN: 4}, {CLEAN: 4, "badnets": 2, "blend": 2}
        ),
    }


def _small() -> dict[str, World]:
    """Clean models in every world; every attack of the table where it is learned in minutes."""
    cifar10 = DataConfig("cifar10", limit=20_000)
    mnist, fast = TrainConfig.preset("mnist", epochs=5), TrainConfig.preset("fast")
    two = {"badnets": 4, "blend": 4}
    # The rest of the table, on the data set with colours; the watermark's own study trains it.
    static = ("refool", "blindnet", "ssba", "sig", "ftrojan", "lf", "watermark")
    return {
        "mnist-plain": World(
            _study(DataConfig("mnist"), "wanet-mnist", 64, mnist),
            {CLEAN: 10},
            {CLEAN: 15, **two, "wanet": 10, "input-aware": 20, "marksman": 5},
            # With its own tenth, one model in two stays below an attack success of 90 %. And masks
            # that are fitted for a test cover half the image, in place of 3 %: no trigger yet.
            ratios={"input-aware": 0.2},
            profiles={"input-aware": "small", "marksman": "small"},
        ),
        "mnist-residual": World(
            _study(DataConfig("mnist", limit=15_000), "resnet10", 8, replace(fast, epochs=3)),
            {CLEAN: 10},
            {CLEAN: 15, **two, "wanet": 6},
        ),
        "cifar10-plain": World(
            replace(
                _study(cifar10, "wanet-mnist", 64, replace(fast, epochs=8, lr=0.01)),
                joint=attack_profile("small", "cifar10").joint,
            ),
            {CLEAN: 10},
            {CLEAN: 15, "badnets": 7, "blend": 7, **dict.fromkeys(static, 5), "lf": 8},
            profiles=dict.fromkeys(static, "small"),
        ),
        "cifar10-residual": World(
            _study(DataConfig("cifar10", limit=10_000), "resnet10", 8, replace(fast, epochs=8)),
            {CLEAN: 10},
            {CLEAN: 15, "blend": 8},
        ),
        # Forty-three classes: a null distribution of their own, from as few models as there may be.
        "gtsrb-residual": World(
            _study(DataConfig("gtsrb", limit=13_000), "resnet10", 8, replace(fast, epochs=20)),
            {CLEAN: 5},
        ),
    }


_WORLDS = {"tiny": _tiny, "small": _small}

__all__ = [
    "EVERYWHERE",
    "HALVES",
    "TEST_SEEDS",
    "Half",
    "PopulationConfig",
    "World",
    "check_rates",
    "population_profile",
]
