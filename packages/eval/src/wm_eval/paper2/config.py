"""What the experiment is made of: one network on one data set, one attack, and many seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from defense_nc import Unlearning
from wm_eval.attacks.config import TABLE, AttackStudyConfig
from wm_eval.attacks.profiles import attack_profile
from wm_eval.config import DataConfig, VictimConfig
from wm_eval.detectors import DETECTORS
from wm_inject.attacks import Profile
from wm_victim import TrainConfig

FINE_TUNING = "fine-tuning"
NAD = "nad"


@dataclass(frozen=True)
class DetectConfig:
    """The experiment of one table row: victims with and without a backdoor, seed by seed.

    Args:
        data: The images. Which of them ``limit`` keeps does not depend on a seed.
        victim: The classifier.
        train: Its training, the same with and without a backdoor; the seed inside plays no role.
        attack: Any attack of the attack table.
        profile: How much fitting its trigger may cost: "tiny", "small" or "paper".
        seeds: Of victim, trigger, defender's images and scan alike.
        target: The label that the attack asks for.
        ratio: Share of poisoned images; the attack's own if None.
        detectors: Names out of `DETECTORS`.
        preset: Of every detector.
        share: Share of the training images that the defender scans with, in (0, 1].
        images: How many they are, in place of the share.
        cleaning_shares: Shares of the training images to clean with, each in (0, 1].
        methods: Ways to clean: "fine-tuning" on clean images alone, the name of a detector whose
            reversed triggers are unlearned, or "nad". Fine-tuning and every detector that has
            image triggers, if None.
        cleaning: How is unlearned; fine-tuning takes the same steps with images in which the
            trigger changes nothing.
        rates: Learning rates of the sweep, which uses the largest share.
        tested: How many test images rates are measured on; all if None.
        compared: How many test images reversed and planted triggers are compared on.
        pictures: How many images the figures show.

    Raises:
        ValueError: An unknown attack, detector or method, no seed or detector, or a value outside
            its range.

    Source: Zheng, Hua and Zhang, sections 4.1 to 4.3.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig("mnist"))
    victim: VictimConfig = field(default_factory=lambda: VictimConfig("wanet-mnist", None))
    train: TrainConfig = field(default_factory=lambda: TrainConfig.preset("mnist"))
    attack: str = "wanet"
    profile: Profile = "small"
    seeds: tuple[int, ...] = tuple(range(10))
    target: int = 0
    ratio: float | None = None
    detectors: tuple[str, ...] = ("nc", "reverse")
    preset: str = "fast"
    share: float = 0.01
    images: int | None = None
    cleaning_shares: tuple[float, ...] = (0.01, 0.03, 0.05)
    methods: tuple[str, ...] | None = None
    cleaning: Unlearning = field(default_factory=lambda: Unlearning.preset("reverse"))
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    tested: int | None = None
    compared: int = 200
    pictures: int = 3

    def __post_init__(self) -> None:
        self.study()  # refuses what no study of attacks can be made of
        if self.attack not in TABLE:
            raise ValueError(f"expected an attack in {', '.join(TABLE)}, got {self.attack!r}")
        _check_names("detectors", self.detectors, tuple(DETECTORS))
        for name in self.detectors:
            DETECTORS[name].preset(self.preset)
        inverting = (name for name in self.detectors if DETECTORS[name].inverts)
        _check_names("methods", self.cleaners, (FINE_TUNING, *inverting, NAD))
        for name, shares in (("share", (self.share,)), ("cleaning_shares", self.cleaning_shares)):
            if not shares or not all(0 < share <= 1 for share in shares):
                raise ValueError(f"expected {name} in (0, 1], got {shares}")
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ValueError(f"expected learning rates > 0, got {self.rates}")
        for name in ("images", "tested", "compared", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")

    @property
    def cleaners(self) -> tuple[str, ...]:
        """The ways to clean."""
        if self.methods is not None:
            return self.methods
        return (FINE_TUNING, *(name for name in self.detectors if DETECTORS[name].inverts))

    def study(self) -> AttackStudyConfig:
        """The study of attacks that trains the victims: this attack alone."""
        start = attack_profile(self.profile, self.data.name)
        return replace(
            start,
            data=self.data,
            victim=self.victim,
            train=self.train,
            attacks=(self.attack,),
            seeds=self.seeds,
            target=self.target,
            ratio=self.ratio,
        )


def detect_preset(
    data: str = "mnist",
    model: str | None = None,
    *,
    width: int | None = None,
    limit: int | None = None,
    **changes: Any,
) -> DetectConfig:
    """The experiment for a data set and a network, with changes.

    WaNet's own network and recipe on MNIST; on other sets a narrow network, and the recipe with
    which WaNet is learned on a CPU. The defender of CIFAR-10 and GTSRB has as many images as in the
    paper, although the victims see fewer than there.

    Args:
        data: "mnist", "cifar10", "gtsrb", "digits", or the path of a folder or .npz file.
        model: A name that `wm_victim.build_classifier` takes, "wanet-mnist", "preactresnet18",
            "vgg16", "mobilenetv2", "resnet10" ...; the data set's usual one if None.
        width: Channels of its first stage; a narrow one if None, and WaNet's network as published.
        limit: How many training images are used; what the data set has on a CPU if None.
        changes: Fields of `DetectConfig` to set otherwise.

    Raises:
        ValueError: A value outside its range, or a field that is none.
    """
    usual = _PRESETS.get(data, _OTHER)
    model = usual.model if model is None else model
    if width is None and model != "wanet-mnist":
        width = usual.width
    settings: dict[str, Any] = {
        "data": DataConfig(data, limit=usual.limit if limit is None else limit),
        "victim": VictimConfig(model, width),
        "train": usual.train,
        "images": usual.images,
    }
    try:
        return DetectConfig(**{**settings, **changes})
    except TypeError as error:
        raise ValueError(f"expected fields of DetectConfig: {error}") from error


def _check_names(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"expected different {what} out of {', '.join(known)}, got {names}")


class _Usual(NamedTuple):
    """What a data set wants."""

    model: str
    train: TrainConfig
    width: int = 16  # of other networks than WaNet's
    limit: int | None = None
    images: int | None = None


_FAST = TrainConfig.preset("fast", epochs=24)
_PRESETS = {
    "mnist": _Usual("wanet-mnist", TrainConfig.preset("mnist")),
    "cifar10": _Usual("preactresnet18", _FAST, limit=20_000, images=500),
    "gtsrb": _Usual("preactresnet18", replace(_FAST, epochs=40), limit=13_000, images=392),
    "digits": _Usual("resnet10", TrainConfig.preset("fast", epochs=8), width=8, images=300),
}
_OTHER = _Usual("preactresnet18", _FAST)

__all__ = ["FINE_TUNING", "NAD", "DetectConfig", "detect_preset"]
