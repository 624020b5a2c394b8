"""Settings of the reverse-engineering, and its presets."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, Literal

from wm_inject.core.checks import check_choice
from wm_inject.core.presets import preset_of

_CHOICES = {
    "precision": ("auto", "float32", "bfloat16"),
    "engine": ("together", "one-by-one"),
    "stack": ("auto", "apart", "vmapped"),
    "score": ("l1", "rms"),
}
# These decide how the same figures are computed, and leave a preset's name alone.
_HOW = frozenset({"name", "precision", "engine", "stack", "images_at_once"})


@dataclass(frozen=True)
class ReverseConfig:
    """How generators are pre-trained and reverse-engineered.

    Presets: "paper" is the paper's text where it is specific; "fast" is the default, and what
    verdicts are calibrated for; "robust" is twice as wide, with a smaller learning rate and more
    steps; "reference" is robust with one label after the other, in float32 and without the race.
    All but "paper" leave the paper in three points:

    - LPIPS is off: a pass through AlexNet costs more than ten times a pass through the generator
      on a CPU.
    - The search for lambda_1 starts far below the paper's 0.1. With 0.1 the first steps push the
      generators of all clean labels into one image that ignores its input (on MNIST: the digit is
      erased), and 200 further steps do not bring them back. From below, each label meets the
      success floor at about the smallest change that reaches it.
    - The output is residual, and starts as a perfect copy, so pre-training has nothing to do. What
      a sigmoid output cannot reconstruct is part of every label's residual, the target's included:
      on an MNIST victim of WaNet the target's residual was 0.40 of the median with it and 0.30
      without (300 steps, one victim).

    Args:
        name: The preset's name, for the record. A preset with changed settings gets a star, so that
            no calibration is used for other settings than its own. ``precision``, ``engine``,
            ``stack`` and ``images_at_once`` may change freely.
        width: Channels of the U-Net's first level; ``depth`` its halvings, ``convs`` the
            convolutions per block, ``residual`` its residual output in place of the sigmoid.
        picture: Learn a fixed picture beside the U-Net, for triggers that are one: see
            `UNetGenerator`. Images that are not square are searched without.
        pretrain_steps: Steps of the reconstruction that every label starts from; none are taken
            with the residual output.
        steps: Steps per label, of ``batch_size`` images, with Adam's learning rate ``lr``.
        lambdas: lambda_1 (attack, where the search starts), lambda_2 (MSE), lambda_3 (LPIPS, whose
            weights must be there if it is above 0).
        success_floor: Share of images that must reach the label before a residual counts.
        compared_from: Success on all images from which a label is compared with the others; a
            little below the floor, which rounds measure on ``round_images`` images only.
        score: The size of a change, as a mean over images: its mean absolute value ("l1",
            equation 5) or its root mean square ("rms", what the loss makes small; small for a faint
            picture all over the image, as Blend adds).
        round_steps: Steps between two decisions of the search.
        round_images: Images that a round measures a label by, 0 for all; what is reported is
            measured on all.
        fallbacks: How many of a label's best generators to keep, in case the best misses the floor
            on all images.
        patience: Rounds without a smaller residual after which a label is finished; 0 for never.
        growth: As ``shrink`` of `LambdaSearch`, > 1.
        milestones: Shares of the steps, in rising order, after which the labels are compared.
        race: Stop labels at the milestones that can no longer become outliers: `generator_halving`.
        candidates: How many labels with the smallest residuals always continue;
            ``references``: how many around the median.
        precision: "auto" trains in bfloat16 where the hardware has it; what is reported is always
            measured in float32.
        engine: "together" trains the generators of all labels in the same steps, "one-by-one" one
            label after the other, and then without the race.
        stack: How generators are trained together: "apart" runs each by itself and the classifier
            once for all, "vmapped" runs all of them at once, with stacked weights; "auto" takes
            "vmapped" on CUDA and "apart" elsewhere.
        images_at_once: Images per pass through the classifier, at most: the memory budget. Labels
            are trained in groups of ``images_at_once // batch_size``.
    """

    name: str = "fast"
    width: int = 8
    depth: int = 2
    convs: int = 1
    residual: bool = True
    picture: bool = True
    pretrain_steps: int = 250
    steps: int = 120
    batch_size: int = 32
    lr: float = 5e-3
    lambdas: tuple[float, float, float] = (1e-3, 1.0, 0.0)
    success_floor: float = 0.95
    compared_from: float = 0.9
    score: Literal["l1", "rms"] = "rms"
    round_steps: int = 8
    round_images: int = 96
    fallbacks: int = 5
    patience: int = 0
    growth: float = 2.0
    shrink: float = 1.5
    milestones: tuple[float, ...] = (0.5, 0.75)
    race: bool = True
    candidates: int = 3
    references: int = 2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Literal["together", "one-by-one"] = "together"
    stack: Literal["auto", "apart", "vmapped"] = "auto"
    images_at_once: int = 512

    def __post_init__(self) -> None:
        positive = ("width", "depth", "convs", "batch_size", "round_steps", "fallbacks")
        for field in (*positive, "candidates", "references", "images_at_once"):
            if getattr(self, field) < 1:
                raise ValueError(f"expected {field} >= 1, got {getattr(self, field)}")
        for field in ("pretrain_steps", "steps", "round_images", "patience"):
            if getattr(self, field) < 0:
                raise ValueError(f"expected {field} >= 0, got {getattr(self, field)}")
        if not self.lr > 0:
            raise ValueError(f"expected lr > 0, got {self.lr}")
        if len(self.lambdas) != 3 or not all(0 <= value < float("inf") for value in self.lambdas):
            raise ValueError(f"expected three lambdas >= 0, got {self.lambdas}")
        if not 0 < self.success_floor <= 1:
            raise ValueError(f"expected success_floor in (0, 1], got {self.success_floor}")
        if not 0 < self.compared_from <= 1:
            raise ValueError(f"expected compared_from in (0, 1], got {self.compared_from}")
        if not self.growth > 1 or not self.shrink > 1:
            raise ValueError(
                f"expected growth and shrink above 1, got {self.growth} and {self.shrink}"
            )
        bounds = (0.0, *self.milestones, 1.0)
        if not all(before < after for before, after in itertools.pairwise(bounds)):
            raise ValueError(
                f"expected milestones in (0, 1) in rising order, got {self.milestones}"
            )
        for field, choices in _CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        if self.race and self.engine == "one-by-one":
            raise ValueError("expected race=False with the engine one-by-one, got race=True")
        object.__setattr__(self, "name", _starred_name(self))

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> ReverseConfig:
        """Settings by name ("paper", "robust", "fast" or "reference"), with changes."""
        return preset_of(cls, PRESETS, name, **{"name": name, **changes})

    def stops(self) -> tuple[int, ...]:
        """The ends of rounds after which labels are compared; the last is the end of the search.

        Examples:
            >>> ReverseConfig(steps=100, round_steps=20, milestones=(0.3, 0.5)).stops()
            (40, 60, 100)
        """
        rounds = {-int(-share * self.steps // self.round_steps) for share in self.milestones}
        early = (count * self.round_steps for count in sorted(rounds))
        return (*(step for step in early if step < self.steps), self.steps)


def _starred_name(config: ReverseConfig) -> str:
    """The name, with a star where settings differ from those of the preset of that name."""
    base = config.name.rstrip("*")
    if base not in PRESETS:
        return config.name
    for field in fields(config):
        if field.name not in _HOW:
            expected = PRESETS[base].get(field.name, field.default)
            if getattr(config, field.name) != expected:
                return f"{base}*"
    return base


_LONG: dict[str, Any] = {"round_images": 0, "milestones": (0.3, 0.5, 0.7)}
_ROBUST: dict[str, Any] = {
    **_LONG,
    "width": 16,
    "pretrain_steps": 400,
    "steps": 700,
    "lr": 2e-3,
    "round_steps": 20,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_LONG,
        "width": 32,
        "depth": 3,
        "convs": 2,
        "residual": False,
        "picture": False,
        "score": "l1",
        "pretrain_steps": 200,
        "steps": 500,
        "batch_size": 64,
        "lr": 1e-3,
        "lambdas": (0.1, 1.0, 0.1),
        "round_steps": 10,
        "race": False,
    },
    "robust": _ROBUST,
    "fast": {},
    "reference": {**_ROBUST, "race": False, "precision": "float32", "engine": "one-by-one"},
}
