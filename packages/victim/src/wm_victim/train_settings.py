"""The settings of ``wm-victim train``: what --config reads and --print-config prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wm_inject.command.config import layered, read_config, refuse_preset
from wm_inject.command.trigger import read_set
from wm_victim.cli_options import ATTACKS
from wm_victim.recipe import TrainConfig

_OWN = ("image_size", "limit", "model", "width", "attack", "profile", "target", "ratio")
_RECIPE = ("epochs", "batch_size", "lr", "schedule", "augment", "precision", "layout")


@dataclass(frozen=True)
class TrainSettings:
    """What ``wm-victim train`` does with a data set.

    Args:
        image_size: Side that images are resized to, in pixels; the set's own if None.
        limit: Train on the first so many of a stratified order; all if None.
        model: A name that `build_classifier` takes.
        width: Channels of its first stage; the architecture's own if None.
        attack: Make this attack's trigger first; none, or that of --trigger, if None.
        profile: How much making it may cost; "small" if None.
        set: Settings of the attack by their names in Python.
        target: The label that is asked for.
        ratio: Share poisoned; 0.1, or the attack's own, if None.
        clean_label: Poison images of the target class only.
        noise_mode: Poison every batch anew, with noise images beside.
        seed: Of every draw; it takes the place of the seed of ``training``.
        training: The recipe.

    Raises:
        ValueError: An attack that no command knows.
    """

    image_size: int | None = None
    limit: int | None = None
    model: str = "resnet10"
    width: int | None = None
    attack: str | None = None
    profile: Literal["tiny", "small", "paper"] | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    target: int = 0
    ratio: float | None = None
    clean_label: bool = False
    noise_mode: bool = False
    seed: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig.preset("fast"))

    def __post_init__(self) -> None:
        if self.attack is not None and self.attack not in ATTACKS:
            raise ValueError(f"expected an attack in {', '.join(ATTACKS)}, got {self.attack!r}")


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The settings that the file and the options ask for.

    ``args.preset`` becomes the name of the preset that the recipe starts from, None if a file says
    it field by field.

    Raises:
        ValueError: Settings that do not fit.
    """
    file = read_config(args)
    refuse_preset(args, "preset", "training", file)
    if args.preset is None:
        told = file.get("training", {"preset": "fast"})
        args.preset = told.get("preset") if isinstance(told, dict) else None
    start = TrainSettings()
    if "training" not in file:
        start = replace(start, training=TrainConfig.preset(args.preset))
    given = {name: getattr(args, name) for name in (*_OWN, "clean_label", "noise_mode", "seed")}
    given |= {"set": read_set(args) or None}
    recipe = {name: getattr(args, name) for name in _RECIPE}
    return layered(args, start, file, {**given, "training": recipe})


__all__ = ["TrainSettings", "train_settings"]
