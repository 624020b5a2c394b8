"""What is cleaned, by which methods, and with how much clean data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from defense_nc import NCConfig
from defense_reverse import ReverseConfig
from wm_eval.attacks.config import CLEAN, AttackStudyConfig

# In the order of the tables: what knows a reversed trigger, with its control; what is blind to it.
TITLES = {
    "control": "Fine-tuning by unlearning's settings",
    "unlearning-nc": "Unlearning, Neural Cleanse",
    "unlearning-reverse": "Unlearning, reverse generators",
    "neuron-pruning": "Neuron pruning, Neural Cleanse",
    "fine-tuning": "Fine-tuning",
    "nad": "NAD",
    "fine-pruning": "Fine-pruning",
    "anp": "ANP",
    "i-bau": "I-BAU",
    "ft-sam": "FT-SAM",
}
METHODS = tuple(TITLES)
# Whose reversed triggers a method cleans with; a method that is not here is blind.
SCANNED_BY = {"unlearning-nc": "nc", "neuron-pruning": "nc", "unlearning-reverse": "reverse"}
# What a scan is asked again about: unlearning leaves a classifier of the same form.
RESCANNED = ("unlearning-nc", "unlearning-reverse")


@dataclass(frozen=True)
class CleaningConfig:
    """Victims, and what is to be done to them.

    Args:
        study: The attack study that the victims belong to: images, classifier, its training,
            attacks (the name "clean" among them asks for the clean victim), target and seeds.
        methods: Names of `TITLES`; they are run in its order. "control" is unlearning with reversed
            generators without the generators; "fine-tuning" has a rate of its own.
        shares: Shares of the training images that the defender owns clean, each in (0, 1].
        steps: Optimiser steps of every method alike.
        preset: Of the methods' own settings, "fast" or "paper".
        settings: By method, settings that differ from the preset's, or another "preset". The
            control has those of "unlearning-reverse" unless it has its own.
        images: Clean images of the defender, for every scan.
        nc: Settings of Neural Cleanse.
        reverse: Settings of the reverse generators.
        alpha: Share of clean models that a scan may call backdoored, in (0, 1).
        rescan: Scan again what unlearning has cleaned.

    Raises:
        ValueError: An unknown method, none at all, or a value outside its range.
    """

    study: AttackStudyConfig = field(default_factory=AttackStudyConfig)
    methods: tuple[str, ...] = METHODS
    shares: tuple[float, ...] = (0.01, 0.03, 0.05)
    steps: int = 300
    preset: str = "fast"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: int = 500
    nc: NCConfig = field(default_factory=NCConfig)
    reverse: ReverseConfig = field(default_factory=ReverseConfig)
    alpha: float = 0.05
    rescan: bool = True

    def __post_init__(self) -> None:
        for what, names in (("methods", self.methods), ("settings of", tuple(self.settings))):
            unknown = sorted(set(names) - set(TITLES))
            if unknown or (what == "methods" and not names):
                got = repr(unknown[0]) if unknown else "none"
                raise ValueError(f"expected {what} methods out of {', '.join(TITLES)}, got {got}")
        shares = self.shares
        if not shares or len(set(shares)) < len(shares) or not all(0 < s <= 1 for s in shares):
            raise ValueError(f"expected different shares in (0, 1], at least one, got {shares}")
        if self.steps < 1 or self.images < 2:
            raise ValueError(
                f"expected steps >= 1 and images >= 2, got {self.steps} and {self.images}"
            )
        if self.preset not in ("fast", "paper"):
            raise ValueError(f"expected the preset small or paper, got {self.preset!r}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"expected alpha in (0, 1), got {self.alpha}")

    @property
    def attacks(self) -> tuple[str, ...]:
        """The victims in the order of the table; the clean one comes first."""
        return (*((CLEAN,) if CLEAN in self.study.attacks else ()), *self.study.rows)

    @property
    def rows(self) -> tuple[str, ...]:
        """The methods in the order of the tables."""
        return tuple(name for name in TITLES if name in self.methods)

    def told(self, method: str) -> dict[str, Any]:
        """What `build_method` is told of a method."""
        source = "unlearning-reverse" if method == "control" else method
        given = self.settings.get(method, self.settings.get(source, {}))
        return {"steps": self.steps, "preset": self.preset, **given}

    @property
    def detectors(self) -> tuple[str, ...]:
        """The scans that the methods need."""
        wanted = {SCANNED_BY[name] for name in self.methods if name in SCANNED_BY}
        return tuple(name for name in ("nc", "reverse") if name in wanted)


__all__ = ["METHODS", "RESCANNED", "SCANNED_BY", "TITLES", "CleaningConfig"]
