"""How SSBA's encoder and decoder are trained: the settings and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

_BENCHMARK_STEPS = 15_640  # 20 epochs of CIFAR-10 in batches of 64


@dataclass(frozen=True)
class SsbaConfig:
    """How encoder and decoder are trained. `preset` names the combinations that mean something.

    Args:
        recipe: The preset this came from; it goes into every record.
        bits: Length of the secret.
        width: Channels of the first convolution of encoder and decoder.
        output: What the encoder gives, see `wm_inject.triggers.ssba.SsbaEncoder`.
        weights: Where weights start: "default" (torch's own, as in the benchmark) or "he" (He's
            normal rule and zero biases, as in StegaStamp; the bits are learned much sooner).
        secret_seed: Seeds the trigger's fixed secret; the seed of the fit if None.
        steps: Optimiser steps; None counts ``epochs``.
        epochs: Passes over the images, each in a new order, where ``steps`` is None.
        batch_size: Images a step.
        lr: Learning rate of Adam.
        image_weight: Weight of the image's mean squared error at the end of its ramp; that of the
            bits' cross entropy is 1.
        learned: Bit accuracy on a batch in (0.5, 1) that, once passed, starts the hold.
        hold: Share of all steps after it that look at the bits alone.
        ramp: Share of all steps over which the image's weight then rises.

    Raises:
        ValueError: A value out of range.

    Source: "paper" is BackdoorBench's training of its SSBA encoder. Its hold of 1000 and ramp of
    3000 steps are shares here, the same numbers at its 15 640 steps, so that shorter runs have
    both. "small" and "tiny" are ours: fewer bits (32 and 8, not 100), narrower (16 and 8, not 32),
    StegaStamp's first weights, batches of 32, a faster rate, and steps that do not depend on the
    number of images; "tiny" also has StegaStamp's residual. With 100 bits, the residual and a
    width of 16 the bits were not learned in 3500 steps.
    """

    recipe: Literal["tiny", "small", "paper"] = "paper"
    bits: int = 100
    width: int = 32
    output: Literal["residual", "image"] = "image"
    weights: Literal["default", "he"] = "default"
    secret_seed: int | None = None
    steps: int | None = None
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-4
    image_weight: float = 10.0
    learned: float = 0.9
    hold: float = 1000 / _BENCHMARK_STEPS
    ramp: float = 3000 / _BENCHMARK_STEPS

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            counted = name == "steps" and value is None
            if not counted and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"expected {name} >= 1, got {value!r}")
        if self.weights not in ("default", "he"):
            raise ValueError(f"expected weights 'default' or 'he', got {self.weights!r}")
        endless = float("inf")
        limits = {"lr": (0, endless), "image_weight": (0, endless), "learned": (0.5, 1)}
        for name, (low, high) in {**limits, "ramp": (0, 1)}.items():
            if not low < getattr(self, name) < high:
                raise ValueError(f"expected {name} in ({low}, {high}), got {getattr(self, name)}")
        if not 0 <= self.hold < 1:
            raise ValueError(f"expected hold in [0, 1), got {self.hold}")

    @classmethod
    def preset(cls, recipe: str = "small", **changes: Any) -> SsbaConfig:
        """The settings of a recipe, with single fields changed.

        Args:
            recipe: "paper" (the benchmark's), "small" (minutes on one CPU core at 32 pixels) or
                "tiny" (seconds, for tests).
            **changes: Fields to change.

        Raises:
            ValueError: An unknown recipe or field, or a value out of range.
        """
        ours: dict[str, Any] = {"weights": "he", "batch_size": 32}
        small = {**ours, "bits": 32, "width": 16, "steps": 3000, "lr": 1e-3}
        tiny = {**ours, "bits": 8, "width": 8, "steps": 400, "lr": 2e-3, "output": "residual"}
        presets: dict[str, dict[str, Any]] = {"tiny": tiny, "small": small, "paper": {}}
        if recipe not in presets:
            raise ValueError(f"expected a preset in {', '.join(presets)}, got {recipe!r}")
        unknown = sorted(set(changes) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"expected settings of SsbaConfig, got {', '.join(unknown)}")
        return cls(**{"recipe": recipe, **presets[recipe], **changes})

    def total_steps(self, count: int) -> int:
        """Optimiser steps on ``count`` images."""
        return self.steps or self.epochs * -(-count // self.batch_size)


__all__ = ["SsbaConfig"]
