"""What a study is made of: one frozen dataclass a stage, and the TOML file that fills them in.

The settings of a stage are the settings of the package that does the work (`JointConfig`,
`TrainConfig`, `NCConfig`, ...), so a study has no vocabulary of its own to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from defense_nc import NCConfig, Unlearning
from defense_reverse import ReverseConfig
from wm_extract import PAPER_CORRUPTIONS, JointConfig, named_corruption
from wm_inject import PoisonPlan, pretrained_card
from wm_inject.core.config import fill as fill
from wm_inject.core.config import load_toml
from wm_victim import TrainConfig


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Args:
        name: A name, folder or .npz file that `wm_victim.load_dataset` takes.
        image_size: Resize to this side, in pixels; the set's own if None.
        limit: Use only this many training images; all if None.

    Raises:
        ValueError: A size or limit below 1.
    """

    name: str = "digits"
    image_size: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")


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
        if self.width is not None and self.width < 1:
            raise ValueError(f"expected width >= 1, got {self.width}")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, and on how many images.

    Args:
        corruptions: Names that `wm_extract.named_corruption` takes; "none" is measured in any case.
        false_positive_rate: What the mark detector's threshold aims at, in (0, 0.5).
        limit: Use only the first so many test images; all if None.
        pictures: How many images the report shows, at least 1.

    Raises:
        ValueError: An unknown corruption or a value outside its range.
    """

    corruptions: tuple[str, ...] = tuple(PAPER_CORRUPTIONS)
    false_positive_rate: float = 1e-3
    limit: int | None = None
    pictures: int = 4

    def __post_init__(self) -> None:
        for name in self.corruptions:
            named_corruption(name)
        if not 0 < self.false_positive_rate < 0.5:
            raise ValueError(
                f"expected false_positive_rate in (0, 0.5), got {self.false_positive_rate}"
            )
        if self.pictures < 1:
            raise ValueError(f"expected pictures >= 1, got {self.pictures}")
        if self.limit is not None and self.limit < 100:
            raise ValueError(f"expected a limit of at least 100 test images, got {self.limit}")


@dataclass(frozen=True)
class DefenceConfig:
    """What the defender has, and when a label is named.

    Args:
        images: Clean training images that a scan uses.
        cleaning_images: Clean labelled training images that cleaning uses.
        alpha: Share of clean models that may be suspected, in (0, 1).
        max_ratio: A named label scores at most this share of the median, in (0, 1].
    """

    images: int = 300
    cleaning_images: int = 600
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.images < 1 or self.cleaning_images < 1:
            raise ValueError("expected the defender to have at least 1 image")
        if not 0 < self.alpha < 1 or not 0 < self.max_ratio <= 1:
            raise ValueError(
                f"expected alpha in (0, 1) and max_ratio in (0, 1], got {self.alpha}, "
                f"{self.max_ratio}"
            )


@dataclass(frozen=True)
class StudyConfig:
    """A whole study: plant, find, remove. Each table is the settings of one stage.

    Args:
        name: Of the study, for its records.
        seed: The one seed; it takes the place of the seeds inside the tables.
        data: The images.
        joint: Training of injector and extractor.
        pretrained: Take injector and extractor ready-made instead, by a name in
            `wm_inject.PRETRAINED`; ``joint`` then plays no role.
        watermark: Path of a picture to hide; the one that ships if None.
        strength: Gain on the change that the injector makes, at poisoning time.
        plan: Which training images are poisoned, and to what label.
        victim: The classifier.
        train: Its training, the same for the clean and the backdoored one.
        measure: Corruptions and counts.
        defence: The defender's images and the decision rule.
        nc: Neural Cleanse.
        reverse: Reverse generators.
        nc_cleaning: Unlearning with Neural Cleanse's trigger.
        reverse_cleaning: Unlearning with the reversed generator.

    Raises:
        ValueError: A negative seed or strength, unknown weights, weights and a watermark, or a plan
            that no static poisoning can follow.
    """

    name: str = "study"
    seed: int = 0
    data: DataConfig = DataConfig()
    joint: JointConfig = field(default_factory=JointConfig)
    watermark: str | None = None
    pretrained: str | None = field(default=None, metadata={"later": True})
    strength: float = 1.0
    plan: PoisonPlan = field(default_factory=PoisonPlan)
    victim: VictimConfig = VictimConfig()
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = MeasureConfig()
    defence: DefenceConfig = DefenceConfig()
    nc: NCConfig = field(default_factory=NCConfig)
    reverse: ReverseConfig = field(default_factory=ReverseConfig)
    nc_cleaning: Unlearning = field(default_factory=lambda: Unlearning.preset("nc"))
    reverse_cleaning: Unlearning = field(default_factory=lambda: Unlearning.preset("nc"))

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"expected a seed >= 0, got {self.seed}")
        if self.strength <= 0:
            raise ValueError(f"expected strength > 0, got {self.strength}")
        if self.pretrained is not None:
            pretrained_card(self.pretrained)
            if self.watermark is not None:
                raise ValueError("expected pretrained or a watermark: weights bring their own")
        if self.plan.mode != "static":
            raise ValueError("expected a static plan: a study poisons its training set once")


def load_study(path: str | Path, *, seed: int | None = None) -> StudyConfig:
    """Read a study from TOML.

    Args:
        path: The file. ``preset = "demo"`` starts from a study that ships, otherwise from the
            defaults; a table may start from a preset of its own class.
        seed: Takes the place of the file's seed if given.

    Raises:
        ValueError: No such file, not TOML, an unknown key, or a value that does not fit.
    """
    from wm_eval.presets import study_preset

    given = load_toml(path, what="a study")
    try:
        start = study_preset(given.pop("preset")) if "preset" in given else StudyConfig()
        study = fill(start, given, "study")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return study if seed is None else replace(study, seed=seed)


def plain(config: Any) -> dict[str, Any]:
    """A settings object as JSON knows it: what a record keeps of it.

    A field that says of itself that it came later is left out where it has its default, so that
    records from before keep their keys.
    """
    kept = {f.name: (f, getattr(config, f.name)) for f in fields(config)}
    return {
        name: _listed(value)
        for name, (f, value) in kept.items()
        if not f.metadata.get("later") or value != f.default
    }


def _listed(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {str(name): _listed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
