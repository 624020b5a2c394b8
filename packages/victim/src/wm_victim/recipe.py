"""How a classifier is trained: the settings, the presets, and the learning rate at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Preset = Literal["paper", "fast", "mnist", "record"]

_WARM_UP = 0.1  # one-cycle: share of the steps until the peak
_FIRST, _LAST = 1 / 25, 1 / 250_000  # one-cycle: first and last rate, as shares of the peak
_TOP = 5 / 24  # triangular: share of the steps until the peak
# Fields that came after the first records: `settings` leaves them out where nobody set them.
_LATER = {"later": True}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of SGD training.

    Args:
        epochs: Passes over the data, at least 1.
        batch_size: Images a step, at least 2.
        lr: The highest learning rate.
        momentum: In [0, 1). It is never cycled.
        weight_decay: On all parameters.
        schedule: "cosine" (from lr to 0), "onecycle" (10 % warm-up, then down to nearly 0),
            "triangular" (up in a line for 5 / 24 of the steps, and down to 0 in another) or
            "constant"; all of them change with every step.
        nesterov: Nesterov's momentum.
        augment: "none", "crop" (4 black pixels around, then a random crop) or "crop-flip" (and a
            mirror image half of the time). A crop moves a small patch trigger about: with a
            one-pixel margin it may take many epochs to be learned.
        precision: "float32", "bfloat16" (autocast) or "auto": bfloat16 where the hardware
            multiplies it fast.
        seed: Seeds the order of images, the augmentation and dropout.
        label_smoothing: Share of the label, in [0, 1), that is spread over all classes.
        cutout: Side in pixels of a black square put somewhere into every training image; 0 for
            none. It may cover a patch trigger.
        layout: How activations lie in memory: "channels-last", or "blocked", oneDNN's own: faster
            for ResNets on a CPU, with other rounding, and for nothing else.
        compile: Compile the network and record its steps as CUDA graphs; on a GPU only.

    Raises:
        ValueError: A value outside its range.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "constant", "triangular"] = "cosine"
    nesterov: bool = False
    augment: Literal["none", "crop", "crop-flip"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    label_smoothing: float = field(default=0.0, metadata=_LATER)
    cutout: int = field(default=0, metadata=_LATER)
    layout: Literal["channels-last", "blocked"] = field(default="channels-last", metadata=_LATER)
    compile: bool = field(default=False, metadata=_LATER)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected a seed in 0 .. 2**32 - 1, got {self.seed}")
        if self.epochs < 1:
            raise ValueError(f"expected at least 1 epoch, got {self.epochs}")
        if self.batch_size < 2:
            raise ValueError(f"expected batches of at least 2 images, got {self.batch_size}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"expected a positive learning rate, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected weight decay >= 0, got {self.weight_decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("expected momentum above 0 with nesterov")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"expected label smoothing in [0, 1), got {self.label_smoothing}")
        if self.cutout < 0:
            raise ValueError(f"expected a cutout of at least 0 pixels, got {self.cutout}")
        choices = {
            "schedule": ("cosine", "onecycle", "constant", "triangular"),
            "augment": ("none", "crop", "crop-flip"),
            "precision": ("auto", "float32", "bfloat16"),
            "layout": ("channels-last", "blocked"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} in {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> TrainConfig:
        """A named recipe, with changes.

        Args:
            name: "paper": 100 epochs of SGD 0.1 with cosine decay, crop and flip, as the victims of
                the watermark paper. "fast": a few epochs without augmentation, small batches, peak
                0.03, for narrow nets on a CPU. "mnist": WaNet's settings for MNIST, annealed.
                "record": 24 epochs for CIFAR-10 in large batches, Nesterov, rates in a triangle,
                crop, flip and cutout, as in Page's "How to train your ResNet".
            changes: Fields to set otherwise.

        Raises:
            ValueError: No such preset, or a field out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset in {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)


_PRESETS = {
    "paper": TrainConfig(epochs=100, augment="crop-flip"),
    "fast": TrainConfig(epochs=6, batch_size=32, lr=0.03, schedule="onecycle"),
    "mnist": TrainConfig(epochs=5, lr=0.01),
    # Page sums the loss and divides the rate by the batch; the mean loss makes that the same.
    "record": TrainConfig(
        epochs=24,
        batch_size=512,
        lr=0.4,
        schedule="triangular",
        nesterov=True,
        augment="crop-flip",
        cutout=8,
    ),
}


def settings(config: TrainConfig) -> dict[str, Any]:
    """The recipe as a checkpoint or a record keeps it.

    Fields that were added later are left out where they have their defaults, so that runs from
    before go on, and keep their keys.
    """
    kept = ((f, getattr(config, f.name)) for f in fields(config))
    return {f.name: value for f, value in kept if not f.metadata.get("later") or value != f.default}


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``.

    A function of the step alone, so that a resumed run has nothing to restore.

    Raises:
        ValueError: A step outside 0 .. total - 1.
    """
    if not 0 <= step < total:
        raise ValueError(f"expected a step in 0 .. {total - 1}, got {step}")
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return config.lr * _fall(step / total)
    if config.schedule == "triangular":
        share = (step + 1) / (total + 1)  # never 0: no step is wasted
        return config.lr * min(share / _TOP, (1 - share) / (1 - _TOP))
    peak = max(1.0, _WARM_UP * total - 1)
    if step <= peak:
        return config.lr * (1 + (_FIRST - 1) * _fall(step / peak))
    return config.lr * (_LAST + (1 - _LAST) * _fall((step - peak) / max(1.0, total - 1 - peak)))


def _fall(share: float) -> float:
    """Half a cosine: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * share))


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype:
    """What "auto" means on this device: bfloat16 where the hardware multiplies it fast.

    Returns:
        `torch.bfloat16` or `torch.float32`.
    """
    import torch

    if precision == "float32":
        return torch.float32
    if precision == "bfloat16":
        return torch.bfloat16
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    # Torch has had no public question for this before 2.12; a missing probe means "no".
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
