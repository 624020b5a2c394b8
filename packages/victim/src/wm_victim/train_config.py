"""The settings of SGD training, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wm_inject.core.checks import check_choice
from wm_inject.core.presets import preset_of

Schedule = Literal["cosine", "onecycle", "constant", "triangular", "airbench", "linear"]
Optimizer = Literal["sgd", "muon"]
Augment = Literal["none", "crop", "crop-flip", "shift", "alternating"]
Precision = Literal["auto", "float32", "bfloat16"]
Layout = Literal["channels-last", "blocked"]
CLASSIFIERS = (
    *("resnet18", "preactresnet18", "resnet10", "preactresnet10"),
    *("vgg16", "mobilenetv2", "wanet-mnist", "airbench"),
)

_WARM_UP = 0.1  # one-cycle: share of the steps until the peak
_FIRST, _LAST = 1 / 25, 1 / 250_000  # one-cycle: first and last rate, as shares of the peak
_TOP = 5 / 24  # triangular: share of the steps until the peak
_AIR_FIRST, _AIR_TOP, _AIR_LAST = 0.2, 0.23, 0.07  # airbench: first rate, steps to the peak, last


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
            "triangular" (up in a line for 5 / 24 of the steps, and down to 0 in another),
            "airbench" (the same from 0.2 of lr, its peak at 0.23, down to 0.07), "linear" (from lr
            to 0) or "constant"; all of them change with every step.
        nesterov: Nesterov's momentum.
        augment: "none", "crop" (4 black pixels around, then a random crop), "crop-flip" (and a
            mirror image half of the time), "shift" (2 reflected pixels around, a crop) or
            "alternating" (and half of the images are mirrored in even epochs, the others in odd
            ones). A crop shifts a patch trigger: one with a one-pixel margin may take many epochs
            to be learned.
        precision: "float32", "bfloat16" (autocast) or "auto": bfloat16 where the hardware
            multiplies it fast.
        label_smoothing: Share of the label, in [0, 1), that is spread over all classes.
        cutout: Side in pixels of a black square in a random position in every training image; 0
            for none. It may cover a patch trigger.
        layout: Memory layout of activations: "channels-last", or "blocked", oneDNN's own: faster
            for ResNets on a CPU without AMX, with other rounding, and not available for others.
        bias_lr: The rate of normalisation layers' biases, in units of the others'.
        average: Steps between two updates of a running average of the weights (lookahead), which
            the weights are set to as well; 0 for none.
        optimizer: "sgd", or "muon": orthogonalised steps for the filters of convolutions, whose
            norm stays; SGD for everything else.
        muon_lr: The highest rate of those steps.
        compile: Compile the network and record its steps as CUDA graphs; on a GPU only.

    Raises:
        ValueError: A value outside its range.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    nesterov: bool = False
    augment: Augment = "none"
    precision: Precision = "auto"
    seed: int = 0
    label_smoothing: float = 0.0
    cutout: int = 0
    layout: Layout = "channels-last"
    bias_lr: float = 1.0
    average: int = 0
    optimizer: Optimizer = "sgd"
    muon_lr: float = 0.24
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected a seed in 0 .. 2**32 - 1, got {self.seed}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("cutout", 0), ("average", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        for name in ("lr", "bias_lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected weight_decay >= 0, got {self.weight_decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("expected momentum above 0 with nesterov")
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("augment", self.augment, get_args(Augment))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_choice("layout", self.layout, get_args(Layout))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """A named recipe, with changes.

        Args:
            name: "paper": 100 epochs of SGD 0.1 with cosine decay, crop and flip, as the victims of
                the watermark paper. "fast": a few epochs without augmentation, small batches, peak
                0.03, for narrow nets on a CPU. "mnist": WaNet's settings for MNIST, annealed.
                "record": 24 epochs for CIFAR-10 in large batches, Nesterov, rates in a triangle,
                crop, flip and cutout, as in Page's "How to train your ResNet". "airbench": 10
                epochs for CIFAR-10 with the network of that name; "airbench-muon": 8 epochs with
                Muon.
            changes: Fields to change.
        """
        return preset_of(cls, _PRESETS, name, **changes)

    def steps_per_epoch(self, count: int) -> int:
        """Batches in a pass over ``count`` images.

        A last batch of a single image is left out: it has no variance for batch normalisation.
        """
        single = count > self.batch_size and count % self.batch_size == 1
        return -(-count // self.batch_size) - single


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 100, "augment": "crop-flip"},
    "fast": {"epochs": 6, "batch_size": 32, "lr": 0.03, "schedule": "onecycle"},
    "mnist": {"epochs": 5, "lr": 0.01},
    # Page sums the loss and divides the rate by the batch; the mean loss makes that the same.
    "record": {
        "epochs": 24,
        "batch_size": 512,
        "lr": 0.4,
        "schedule": "triangular",
        "nesterov": True,
        "augment": "crop-flip",
        "cutout": 8,
    },
    # Its loss is summed over the batch of 1024: the mean loss takes lr and decay accordingly.
    "airbench": {
        "epochs": 10,
        "batch_size": 1024,
        "lr": 1.5,
        "momentum": 0.85,
        "weight_decay": 1.33e-3,
        "schedule": "airbench",
        "nesterov": True,
        "augment": "alternating",
        "label_smoothing": 0.2,
        "bias_lr": 64.0,
        "average": 5,
    },
    # Rates and decay for the mean of a batch of 2,000, and for this network's scale of the head.
    "airbench-muon": {
        "epochs": 8,
        "batch_size": 2000,
        "lr": 1.66,
        "momentum": 0.85,
        "weight_decay": 2.4e-3,
        "schedule": "linear",
        "nesterov": True,
        "augment": "alternating",
        "label_smoothing": 0.2,
        "bias_lr": 64.0,
        "optimizer": "muon",
    },
}


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: a function of the step alone.

    Raises:
        ValueError: A step outside 0 .. total - 1.
    """
    if not 0 <= step < total:
        raise ValueError(f"expected a step in 0 .. {total - 1}, got {step}")
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return config.lr * _half_cosine(step / total)
    if config.schedule == "linear":
        return config.lr * (1 - step / total)
    if config.schedule == "triangular":
        share = (step + 1) / (total + 1)  # never 0: no step is wasted
        return config.lr * min(share / _TOP, (1 - share) / (1 - _TOP))
    if config.schedule == "airbench":
        share = step / total
        if share < _AIR_TOP:
            return config.lr * (_AIR_FIRST + (1 - _AIR_FIRST) * share / _AIR_TOP)
        return config.lr * (1 - (1 - _AIR_LAST) * (share - _AIR_TOP) / (1 - _AIR_TOP))
    peak = max(1.0, _WARM_UP * total - 1)
    if step <= peak:
        return config.lr * (1 + (_FIRST - 1) * _half_cosine(step / peak))
    share = (step - peak) / max(1.0, total - 1 - peak)
    return config.lr * (_LAST + (1 - _LAST) * _half_cosine(share))


def _half_cosine(share: float) -> float:
    """From 1 at a share of 0 to 0 at a share of 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
