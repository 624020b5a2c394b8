"""The settings of ``wm-extract train``: what --config reads and --print-config prints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from wm_extract.recipe import JointConfig
from wm_inject.command.config import layered, read_config, refuse_preset


@dataclass(frozen=True)
class TrainSettings:
    """What ``wm-extract train`` does with a folder.

    Args:
        image_size: Side that images are resized to, in pixels.
        grey: One channel instead of RGB.
        false_positive_rate: What the detector's threshold aims at, in (0, 0.5).
        seed: Of every draw.
        training: Training of injector and extractor.
    """

    image_size: int = 32
    grey: bool = False
    false_positive_rate: float = 1e-3
    seed: int = 0
    training: JointConfig = field(default_factory=JointConfig)


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The settings that the file and the options ask for.

    Raises:
        ValueError: Settings that do not fit.
    """
    file = read_config(args)
    refuse_preset(args, "recipe", "training", file)
    start = TrainSettings()
    if args.recipe is not None:
        start = replace(start, training=JointConfig.preset(args.recipe))
    training = {"size": args.size, "iterations": args.iterations, "psnr_floor": args.psnr}
    names = ("image_size", "grey", "false_positive_rate", "seed")
    given = {name: getattr(args, name) for name in names}
    return layered(args, start, file, {**given, "training": training})


__all__ = ["TrainSettings", "train_settings"]
