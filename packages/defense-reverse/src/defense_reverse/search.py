"""Settings of the reverse-engineering, and the search for the attack's weight in its loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

_NARROW = 1.1  # a bracket of less than this factor has told all it can


@dataclass(frozen=True)
class ReverseConfig:
    """How generators are pre-trained and reverse-engineered.

    Presets (`ReverseConfig.preset`): "paper" is the paper's text where it speaks, "robust" is the
    default, "fast" is robust with fewer steps. These two leave the paper in three points:

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
        name: The preset's name, for the record.
        width: Channels of the U-Net's first level.
        depth: Halvings of the U-Net.
        convs: Convolutions per block of the U-Net.
        residual: The U-Net's residual output in place of the sigmoid.
        pretrain_steps: Steps of the reconstruction that every label starts from; none are needed,
            nor taken, with the residual output.
        steps: Steps per label.
        batch_size: Images per step.
        lr: Adam's learning rate.
        lambdas: lambda_1 (attack, where the search starts), lambda_2 (MSE), lambda_3 (LPIPS). With
            lambda_3 > 0 the LPIPS weights must be there.
        success_floor: Share of images that must reach the label before a residual counts.
        round_steps: Steps between two decisions of the search.
        growth: Factor on lambda_1 after a failure with no success yet, > 1.
        shrink: Divisor of lambda_1 after a success with no failure nearby, > 1.
        precision: "auto" takes bfloat16 autocast in training where the hardware has it; what is
            measured is always float32.

    Raises:
        ValueError: A setting outside its range.
    """

    name: str = "robust"
    width: int = 16
    depth: int = 2
    convs: int = 1
    residual: bool = True
    pretrain_steps: int = 400
    steps: int = 700
    batch_size: int = 32
    lr: float = 2e-3
    lambdas: tuple[float, float, float] = (1e-3, 1.0, 0.0)
    success_floor: float = 0.95
    round_steps: int = 20
    growth: float = 2.0
    shrink: float = 1.5
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for field in ("width", "depth", "convs", "batch_size", "round_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"expected {field} >= 1, got {getattr(self, field)}")
        for field in ("pretrain_steps", "steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"expected {field} >= 0, got {getattr(self, field)}")
        if not self.lr > 0:
            raise ValueError(f"expected lr > 0, got {self.lr}")
        if len(self.lambdas) != 3 or not all(0 <= value < float("inf") for value in self.lambdas):
            raise ValueError(f"expected three lambdas >= 0, got {self.lambdas}")
        if not 0 < self.success_floor <= 1:
            raise ValueError(f"expected success_floor in (0, 1], got {self.success_floor}")
        if not self.growth > 1 or not self.shrink > 1:
            raise ValueError(
                f"expected growth and shrink above 1, got {self.growth} and {self.shrink}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"expected precision auto, float32 or bfloat16, got {self.precision!r}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReverseConfig:
        """Settings by name ("paper", "robust" or "fast"), with changes.

        Raises:
            ValueError: An unknown name, or a setting outside its range.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset in {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)


class LambdaSearch:
    """The binary search for lambda_1: pure, one decision at a time.

    After a failure lambda_1 grows, after a success it shrinks; between the last failure and the
    last success it takes their geometric mean. The generator learns while the search goes on, so
    that an old failure says less and less: a bracket that has become narrow is opened again, by
    the smaller factor on both sides.

    Args:
        start: The first value.
        growth: Factor after a failure before any success.
        shrink: Divisor after a success with no failure below it; opens a narrow bracket too.

    Raises:
        ValueError: A negative start, or a factor not above 1.

    Source: the paper searches lambda_1 by "a binary search ... to achieve a high attack success
        rate" and tells no more.
    """

    def __init__(self, start: float, *, growth: float = 2.0, shrink: float = 1.5) -> None:
        if not 0 <= start < float("inf"):
            raise ValueError(f"expected a first weight >= 0, got {start}")
        if not growth > 1 or not shrink > 1:
            raise ValueError(f"expected growth and shrink above 1, got {growth} and {shrink}")
        self.value = float(start)
        self._growth, self._shrink = growth, shrink
        self._failure: float | None = None
        self._success: float | None = None

    def __repr__(self) -> str:
        return f"LambdaSearch(value={self.value:.4g})"

    def update(self, *, success: bool) -> float:
        """Take in whether the floor was reached with the present value, and give the next one."""
        if success:
            self._success = self.value
        else:
            self._failure = self.value
        low, high = self._failure, self._success
        if low is not None and high is not None and high > low * _NARROW:
            self.value = (low * high) ** 0.5
        elif success:
            self.value /= self._shrink
        else:
            self.value *= self._growth if high is None else self._shrink
        return self.value


_PRESETS = {
    "paper": ReverseConfig(
        name="paper",
        width=32,
        depth=3,
        convs=2,
        residual=False,
        pretrain_steps=200,
        steps=500,
        batch_size=64,
        lr=1e-3,
        lambdas=(0.1, 1.0, 0.1),
        round_steps=10,
    ),
    "robust": ReverseConfig(),
    "fast": ReverseConfig(name="fast", pretrain_steps=250, steps=300, round_steps=15),
}
