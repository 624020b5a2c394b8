"""What a study is: one dataclass that is data, filled from TOML; shipped ones in ``studies/``.

The settings of a stage are those of the package that does the work (`JointConfig`, `TrainConfig`,
a detector's or a mitigation's own).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from wm_eval.detectors import detector
from wm_eval.methods import build_method, detectors_of
from wm_eval.titles import ATTACKS, CLEAN, DETECTORS, METHODS, in_order
from wm_extract import PAPER_CORRUPTIONS, JointConfig, named_corruption
from wm_inject import pretrained_card
from wm_inject.attacks import PROFILES, Profile
from wm_inject.core.toml_settings import fill, load_toml
from wm_victim import TrainConfig

Corruptions = Literal["plain", "corrupted"]
CORRUPTIONS: tuple[Corruptions, ...] = ("plain", "corrupted")
Part = Literal["rates", "baseline", "stealth", "tiles", "mark", "reversed", "closeness", "exports"]
PARTS: tuple[Part, ...] = (
    *("rates", "baseline", "stealth", "tiles", "mark", "reversed", "closeness", "exports"),
)
Split = Literal["calibration", "test", "unseen"]
SPLITS: tuple[Split, ...] = ("calibration", "test", "unseen")
SPLIT_SEEDS = 1000  # seeds of a split start at a multiple of it: no seed is ever in two
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_LISTED = 20  # names at most that an error lists; of more, the nearest


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Args:
        name: A name, folder or .npz file that `wm_victim.load_dataset` takes.
        classes: Keep these, by index, numbered in this order; all if None.
        image_size: Resize to this side, in pixels; the set's own if None.
        limit: Use only this many training images; all if None.

    Raises:
        ValueError: A size or limit below 1.
    """

    name: str = "digits"
    classes: tuple[int, ...] | None = None
    image_size: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "image_size", "limit")


@dataclass(frozen=True)
class VictimConfig:
    """Which classifier.

    Args:
        model: A name that `wm_victim.build_classifier` takes.
        width: Base width; the architecture's own if None.

    Raises:
        ValueError: A width below 1.
    """

    model: str = "resnet10"
    width: int | None = 16

    def __post_init__(self) -> None:
        _at_least_one(self, "width")


@dataclass(frozen=True)
class WatermarkConfig:
    """How the attacks "watermark" and "equation2" get their trigger.

    Args:
        joint: Training of injector and extractor.
        pretrained: Take both ready-made instead, by a name in `wm_inject.PRETRAINED`; ``joint``
            then plays no role.
        picture: Path of a picture to hide; the one that ships if None.
        strength: Gain on the change that the injector makes, at poisoning time.
        weight: lambda of equation 2, the share of the blended picture, in (0, 1].

    Raises:
        ValueError: Unknown weights, weights and a picture, or a value outside its range.
    """

    joint: JointConfig = field(default_factory=JointConfig)
    pretrained: str | None = None
    picture: str | None = None
    strength: float = 1.0
    weight: float = 0.2

    def __post_init__(self) -> None:
        if not self.strength > 0 or not 0 < self.weight <= 1:
            raise ValueError(
                f"expected strength > 0 and weight in (0, 1], got {self.strength}, {self.weight}"
            )
        if self.pretrained is not None:
            pretrained_card(self.pretrained)
            if self.picture is not None:
                raise ValueError("expected pretrained or a picture: weights bring their own")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, and on how many test images.

    Args:
        corruptions: Names that `wm_extract.named_corruption` takes; "none" is measured in any case.
        limit: Rates are measured on the first so many; on all if None.
        corrupted: Under corruptions, on the first so many of these; on the same if None.
        stealth: Stealth figures are means of so many.
        watched: Victims are watched on so many while they train.
        compared: Reversed and planted triggers are compared on so many.
        pictures: How many images the figures show.
        false_positive_rate: What the mark detector's threshold aims at, in (0, 0.5).

    Raises:
        ValueError: An unknown corruption or a value outside its range.
    """

    corruptions: tuple[str, ...] = tuple(PAPER_CORRUPTIONS)
    limit: int | None = None
    corrupted: int | None = None
    stealth: int = 1000
    watched: int = 500
    compared: int = 200
    pictures: int = 4
    false_positive_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in self.corruptions:
            named_corruption(name)
        if not 0 < self.false_positive_rate < 0.5:
            raise ValueError(
                f"expected false_positive_rate in (0, 0.5), got {self.false_positive_rate}"
            )
        _at_least_one(self, "limit", "corrupted", "stealth", "watched", "compared", "pictures")


@dataclass(frozen=True)
class DefenderConfig:
    """What the defender has.

    Args:
        images: Clean training images to scan with.
        fraction: Instead of a number: this fraction of the training images, in (0, 1].
        alpha: Share of clean models that a scan may call backdoored, in (0, 1).
        fractions: Fractions of the training images to mitigate with, each in (0, 1].
        steps: Optimiser steps of every mitigation alike.
        passes: Instead of steps: passes over the images and as many triggered copies.
        clean_victims: Mitigate the clean victims, too: what a mitigation costs.
        oracle_labels: Where the scan did not name the true label, mitigate with it as well.
        rescan: Scan again what unlearning has repaired.
        reactivation: Train what was repaired, and the clean victim, further with so many poisoned
            images among the clean ones of the fraction, and measure the attack success again.

    Raises:
        ValueError: A value outside its range.
    """

    images: int = 500
    fraction: float | None = None
    alpha: float = 0.05
    fractions: tuple[float, ...] = (0.01, 0.03, 0.05)
    steps: int = 300
    passes: int | None = None
    clean_victims: bool = False
    oracle_labels: bool = False
    rescan: bool = False
    reactivation: tuple[int, ...] = field(default=(), metadata={"later": True})

    def __post_init__(self) -> None:
        if self.images < 2 or self.steps < 1:
            raise ValueError(
                f"expected images >= 2 and steps >= 1, got {self.images} and {self.steps}"
            )
        _at_least_one(self, "passes")
        for share in (*self.fractions, *(() if self.fraction is None else (self.fraction,))):
            if not 0 < share <= 1:
                raise ValueError(f"expected fractions in (0, 1], got {share}")
        _different("fractions", self.fractions)
        if any(count < 1 for count in self.reactivation):
            raise ValueError(f"expected reactivation >= 1 image, got {self.reactivation}")
        _different("reactivation", self.reactivation)
        if not 0 < self.alpha < 1:
            raise ValueError(f"expected alpha in (0, 1), got {self.alpha}")


@dataclass(frozen=True)
class Setting:
    """One data set, network and training of a population, and how many models of it there are.

    Args:
        data: The images.
        victim: The classifier.
        train: Its training.
        triggers: Settings of attacks; the study's for those that are not here.
        calibration: Attack (or "clean") to the number of models that may choose thresholds.
        test: Attack (or "clean") to the number of models that figures come from.
        unseen: Attack (or "clean") to the number of models that are judged by what the clean ones
            of all *other* networks calibrate: as a stranger's model is.
        detectors: Names of detectors: those of the study among them scan these models. All of the
            study's if there are none.

    Raises:
        ValueError: An unknown attack, or a count below zero or above 1,000 (seeds would meet).
    """

    data: DataConfig = field(default_factory=DataConfig)
    victim: VictimConfig = field(default_factory=VictimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    triggers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)
    unseen: Mapping[str, int] = field(default_factory=dict)
    detectors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_triggers(self.triggers)
        for split in SPLITS:
            counts = self.counts(split)
            _known("attacks", counts, ATTACKS)
            if any(not 0 <= n <= SPLIT_SEEDS for n in counts.values()):
                raise ValueError(f"expected counts in 0 .. {SPLIT_SEEDS}, got {dict(counts)}")

    def counts(self, split: Split) -> Mapping[str, int]:
        """Attack (or "clean") to the number of models of a split."""
        counts: Mapping[str, int] = getattr(self, split)
        return counts

    def models(self, split: Split) -> tuple[tuple[str, int], ...]:
        """Attack and seed of every model of a split; clean ones first, as others may need them."""
        counts, first = self.counts(split), SPLIT_SEEDS * SPLITS.index(split)
        names = sorted(counts, key=lambda name: (name != CLEAN, name))
        return tuple((name, first + i) for name in names for i in range(counts[name]))


@dataclass(frozen=True)
class Study:
    """A study: which victims are trained, and what is done to them.

    Args:
        name: Of the study, and of its folder.
        seeds: Of victims, triggers, defenders and scans alike; everything is done once for each.
        data: The images. Which of them ``limit`` keeps does not depend on a seed.
        victim: The classifier.
        train: Its training; the seed inside it plays no role.
        attack_train: By attack: settings of its victims' training that differ from ``train``.
        attacks: Names out of `ATTACKS`, "clean" among them for the clean victim.
        profile: How much fitting a trigger may cost: "tiny", "small" or "paper".
        triggers: By attack: settings of its trigger, or a "profile" or "ratio" of its own.
        watermark: Of the attacks "watermark" and "equation2".
        target: The label that the attacks ask for.
        ratio: Share of poisoned images; each attack's own if None.
        corruptions: "plain" trains victims as they are; "corrupted" applies the paper's corruptions
            to training batches. What comes after the rates is done to the first.
        corruption_probability: Of each corruption for "corrupted", in (0, 1].
        parts: What is measured, out of `PARTS`.
        measure: On what.
        detectors: By name: "preset", and settings that differ from it.
        mitigations: By name: "preset", and settings that differ from it.
        learning_rates: Mitigate with the largest fraction at these rates, too, with the first seed.
        defender: What detectors and mitigations work with.
        settings: By name: the settings of a population, in place of data, victim, train, seeds and
            attacks. Every seed has a target of its own there: no label is special.

    Raises:
        ValueError: An unknown name, none where one is needed, or a value outside its range.
    """

    name: str = "study"
    seeds: tuple[int, ...] = (0,)
    data: DataConfig = field(default_factory=DataConfig)
    victim: VictimConfig = field(default_factory=VictimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    attack_train: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attacks: tuple[str, ...] = ()
    profile: Profile = "small"
    triggers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)
    target: int = 0
    ratio: float | None = None
    corruptions: tuple[Corruptions, ...] = ("plain",)
    corruption_probability: float = 0.3
    parts: tuple[Part, ...] = ("rates",)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    detectors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mitigations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    defender: DefenderConfig = field(default_factory=DefenderConfig)
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"expected a lower-case name of the study, got {self.name!r}")
        for what, names, known in (
            ("attacks", self.attacks, ATTACKS),
            ("corruptions", self.corruptions, CORRUPTIONS),
            ("parts", self.parts, PARTS),
            ("profile", (self.profile,), PROFILES),
            ("mitigations", self.mitigations, METHODS),
        ):
            _known(what, names, known)
        if not (self.attacks or self.settings) or not self.corruptions or not self.seeds:
            raise ValueError("expected at least one attack, one of corruptions and one seed")
        _different("seeds", self.seeds)
        if min(self.seeds) < 0 or self.target < 0:
            raise ValueError(f"expected seeds and target >= 0, got {self.seeds}, {self.target}")
        for name in ("corruption_probability", "ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {value}")
        if any(not rate > 0 for rate in self.learning_rates):
            raise ValueError(f"expected learning_rates > 0, got {self.learning_rates}")
        _check_triggers(self.triggers)
        _known("attack_train of attacks", self.attack_train, ATTACKS)
        for name in self.attack_train:
            self.train_of(name)
        for name in self.settings:
            if not _NAME.fullmatch(name) or name == "all":
                raise ValueError(f"expected lower-case names of settings, got {name!r}")
        for setting in self.settings.values():
            _known("detectors of a setting", setting.detectors, DETECTORS)
        for name, changes in self.detectors.items():
            detector(name, **changes)
        for name, changes in self.mitigations.items():
            build_method(name, **{"steps": self.defender.steps, **changes})
            for source in detectors_of(name):
                if source not in self.detectors:
                    raise ValueError(f"expected the detector {source}, whose triggers {name} needs")

    @property
    def rows(self) -> tuple[str, ...]:
        """The attacks in the order of the tables, the clean victim first."""
        return tuple(sorted(in_order(self.attacks, ATTACKS), key=lambda name: name != CLEAN))

    def train_of(self, attack: str) -> TrainConfig:
        """The training of an attack's victims."""
        return fill(self.train, self.attack_train.get(attack, {}), f"attack_train.{attack}")

    @property
    def methods(self) -> tuple[str, ...]:
        """The mitigations in the order of the tables."""
        return tuple(in_order(self.mitigations, METHODS))


def load_study(name: str | Path, *, seed: int | None = None, changes: str = "") -> Study:
    """A study that ships, by its name, or any other from its TOML file.

    Args:
        name: A name out of `shipped_studies`, or a path. ``base = "demo"`` in a file starts from a
            study that ships, otherwise from the defaults; a table may start from a preset of its
            own class.
        seed: The first seed, in place of the file's; there are as many as the file has.
        changes: TOML that is laid over the file.

    Raises:
        ValueError: No such study or file, not TOML, an unknown key, or a value that does not fit.
    """
    path = _path(name)
    try:
        study = _laid_over(load_toml(path, what="a study"))
        if changes:
            import tomllib

            study = _filled(study, tomllib.loads(changes))
        if seed is not None:
            study = replace(study, seeds=tuple(range(seed, seed + len(study.seeds))))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return study


def shipped_studies() -> dict[str, Path]:
    """The TOML files that ship, by the name of the study."""
    folder = Path(str(files("wm_eval") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def plain(config: Any) -> dict[str, Any]:
    """A settings object as JSON knows it: what a record keeps of it.

    A field that is marked as ``later`` is left out at its default, so that records from before it
    was there stay those of the same settings.
    """
    values = {f: getattr(config, f.name) for f in fields(config)}
    return {
        f.name: _listed(value)
        for f, value in values.items()
        if not f.metadata.get("later") or value != f.default
    }


def _path(name: str | Path) -> Path:
    shipped = shipped_studies()
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if path.suffix != ".toml":
        raise ValueError(
            f"expected a TOML file, or the name of one of {len(shipped)} studies that ship "
            f"(wm-eval run --help lists them), got {name}"
        )
    return path


def _laid_over(given: dict[str, Any]) -> Study:
    """A study from what its file says, over the study that it starts from."""
    base = given.pop("base", None)
    if base is None:
        return _filled(Study(attacks=(CLEAN,)), given)
    shipped = shipped_studies()
    if base not in shipped:
        raise ValueError(f"expected a base that ships, see wm-eval run --help, got {base!r}")
    return _filled(_laid_over(load_toml(shipped[base])), given)


def _filled(start: Study, given: dict[str, Any]) -> Study:
    for name, table in given.items():
        if isinstance(table, Mapping) and "seed" in table:
            raise ValueError(f"expected seeds at the top of the study, got one in {name}")
    return fill(start, given, "study")


def _known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        listing = ", ".join(known)
        if len(known) > _LISTED:
            close = get_close_matches(unknown[0], known, n=4, cutoff=0)
            listing = f"{len(known)} names ({', '.join(close)} are the most alike)"
        raise ValueError(f"expected {what} out of {listing}, got {unknown[0]!r}")
    _different(what, names)


def _different(what: str, values: Iterable[Any]) -> None:
    if len(set(values)) < len(list(values)):
        raise ValueError(f"expected different {what}, got {tuple(values)}")


def _check_triggers(triggers: Mapping[str, Mapping[str, Any]]) -> None:
    _known("triggers of attacks", triggers, [name for name in ATTACKS if name != CLEAN])


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")


def _listed(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {str(name): _listed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
