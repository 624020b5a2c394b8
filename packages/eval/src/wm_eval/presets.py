"""The studies that ship: every number of them stands here, and nowhere else.

A preset's name is in every record. A TOML file may start from one (``preset = "cifar10"``) and
change what it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from defense_nc import NCConfig, Unlearning
from defense_reverse import ReverseConfig
from wm_eval.config import DataConfig, DefenceConfig, MeasureConfig, StudyConfig, VictimConfig
from wm_extract import JointConfig
from wm_inject import PoisonPlan
from wm_victim import TrainConfig


def demo() -> StudyConfig:
    """The bundled handwritten digits, in minutes on two CPU cores."""
    return StudyConfig(
        name="demo",
        data=DataConfig(name="digits"),
        joint=JointConfig.preset("robust", iterations=600, psnr_floor=39.0),
        plan=PoisonPlan(ratio=0.1, target=0),
        victim=VictimConfig(model="resnet10", width=16),
        train=TrainConfig.preset("fast", epochs=8),
        measure=MeasureConfig(),
        defence=DefenceConfig(images=300, cleaning_images=600),
        nc=NCConfig.preset("fast"),
        reverse=ReverseConfig.preset("fast"),
        nc_cleaning=Unlearning.preset("nc"),
        reverse_cleaning=Unlearning.preset("reverse"),
    )


def demo_pretrained() -> StudyConfig:
    """The demo with a watermark that ships, and that was trained on some of these images too."""
    return replace(demo(), name="demo-pretrained", pretrained="tiny-32-grey")


def cifar10() -> StudyConfig:
    """CIFAR-10, 20 thousand training images: about half an hour on two CPU cores."""
    return StudyConfig(
        name="cifar10",
        data=DataConfig(name="cifar10", limit=20_000),
        joint=JointConfig.preset("robust", iterations=2500, psnr_floor=36.2),
        plan=PoisonPlan(ratio=0.1, target=0),
        victim=VictimConfig(model="resnet10", width=16),
        train=TrainConfig.preset("fast", epochs=12),
        measure=MeasureConfig(),
        defence=DefenceConfig(images=500, cleaning_images=1000),
        nc=NCConfig.preset("fast"),
        reverse=ReverseConfig.preset("fast"),
        nc_cleaning=Unlearning.preset("nc"),
        reverse_cleaning=Unlearning.preset("reverse"),
    )


PRESETS: dict[str, Callable[[], StudyConfig]] = {
    "demo": demo,
    "cifar10": cifar10,
    "demo-pretrained": demo_pretrained,
}


def study_preset(name: str) -> StudyConfig:
    """A study by name: "demo", "cifar10" or "demo-pretrained".

    Raises:
        ValueError: No such study.
    """
    if name not in PRESETS:
        raise ValueError(f"expected a study in {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
