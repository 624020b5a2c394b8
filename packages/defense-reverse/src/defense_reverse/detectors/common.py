"""What both rivals share: what they look at, a mask between 0 and 1, and how they report."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from defense_nc import ScanReport, Verdict
from defense_reverse.detectors.split import (
    FeatureSplit,
    check_split,
    image_scale,
    split_at_last_map,
)
from defense_reverse.generator import UNetGenerator
from wm_inject.core.images import check_images, check_labels, quantize
from wm_victim.inference import frozen, predict


class Examined(NamedTuple):
    """A frozen classifier in two parts, and the defender's images as it sees them."""

    model: nn.Module
    split: FeatureSplit
    images: Tensor  # (N, C, H, W) in [0, 1]
    labels: Tensor  # (N,)
    features: Tensor  # of the images, (N, ...), without gradients
    scale: Tensor  # (1, C, 1, 1): the unit of a change of an image
    num_classes: int


class UNetSettings(Protocol):
    """The settings of a generator, as both rivals name them."""

    @property
    def width(self) -> int:
        """Channels of the first level."""

    @property
    def depth(self) -> int:
        """Halvings."""

    @property
    def convs(self) -> int:
        """Convolutions per block."""

    @property
    def residual(self) -> bool:
        """Residual output in place of the sigmoid."""


@contextmanager
def examine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    device: torch.device | str | None,
) -> Iterator[Examined]:
    """Hold a model in eval mode without gradients and take its features, then give it back.

    Raises:
        ValueError: Bad images or labels, images of one class only, a model that answers no logits,
            or that cannot be split.
    """
    check_images(images)
    with frozen(model):
        # A copy where it must move: the caller's model stays where it is.
        held = model if device is None else copy.deepcopy(model).to(device)
        images = images.to(_place(held)).contiguous(memory_format=torch.channels_last)
        answers = predict(held, images)
        num_classes = answers.shape[1]
        labels = answers.argmax(1) if labels is None else labels.to(images.device)
        check_labels(labels, len(images), num_classes=num_classes)
        if len(labels.unique()) < 2:
            raise ValueError("expected images of at least two classes, got one")
        split = split_at_last_map(held)
        check_split(split, held, images[:2])
        with torch.no_grad():
            features = torch.cat([split.features(part) for part in images.split(256)])
        scale = image_scale(held, images)
        yield Examined(held, split, images, labels, features, scale, num_classes)


def check_alpha(alpha: float) -> None:
    """Refuse a rate that `judge` would refuse, before the long work and not after it.

    Raises:
        ValueError: Not in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"expected alpha in (0, 1), got {alpha}")


def check_settings(config: object, counts: Sequence[str], positive: Sequence[str]) -> None:
    """Refuse settings of which one of ``counts`` is below 1, or one of ``positive`` not above 0.

    Raises:
        ValueError: Such a setting.
    """
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"expected {name} >= 1, got {getattr(config, name)}")
    for name in positive:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"expected {name} > 0, got {getattr(config, name)}")


def new_generator(seen: Examined, config: UNetSettings, *, seed: int) -> UNetGenerator:
    """A fresh generator for the images of a classifier, on their device."""
    generator = UNetGenerator(
        channels=seen.images.shape[1],
        width=config.width,
        depth=config.depth,
        convs=config.convs,
        residual=config.residual,
        seed=seed,
    )
    return generator.to(seen.images.device).to(memory_format=torch.channels_last)


def squash(theta: Tensor) -> Tensor:
    """A mask between 0 and 1 from free numbers: ``tanh(theta) / 2 + 1/2``."""
    return torch.tanh(theta) / 2 + 0.5


def batches(count: int, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Batches of row numbers without end, every row once before any row again."""
    size = min(size, count)
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=random)])
        yield rest[:size]
        rest = rest[size:]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(seen: Examined, generator: UNetGenerator, images: Tensor) -> tuple[Tensor, float]:
    """The answers ``(N,)`` to 8-bit generated images, and their mean absolute change."""
    answers, change = [], 0.0
    with torch.no_grad():
        for part in images.split(256):
            generated = quantize(generator(part))
            answers.append(seen.model(generated).argmax(1))
            change += float((generated - part).abs().mean(dim=(1, 2, 3)).double().sum())
    return torch.cat(answers), change / len(images)


def with_own_verdict(report: ScanReport, suspected: Sequence[int], reason: str) -> ScanReport:
    """The report, with the verdict of a method's own rule in place of `judge`'s."""
    verdict = Verdict.BACKDOORED if suspected else Verdict.CLEAN
    return replace(report, verdict=verdict, suspected=tuple(suspected), reason=reason)


def _place(model: nn.Module) -> torch.device:
    tensor = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    return torch.device("cpu") if tensor is None else tensor.device
