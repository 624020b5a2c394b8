"""What an attack is given to make its trigger, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels
from wm_inject.core.plan import CoTraining


class Length(NamedTuple):
    """How long a victim is trained: some attacks' own schedules follow it."""

    steps: int  # in an epoch
    epochs: int


@dataclass(frozen=True)
class FitContext:
    """What an attack may use to make its trigger.

    Args:
        images: Clean training images, float32 ``(N, C, H, W)`` in [0, 1], square.
        labels: Their labels, int64 ``(N,)``.
        num_classes: K.
        target: The label that the attack asks for.
        seed: Seeds every draw.
        co_train: Trains a fresh classifier by the victim's own recipe and returns it: clean for
            None (a surrogate to search on), together with the attack for a hook.
        length: How long that training is, if it is known.
        checkpoint: A file to keep what is half done in, and to go on from.
        progress: Show how far it is.

    Raises:
        ValueError: Bad images or labels, or a target that is no class.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    target: int
    seed: int
    co_train: Callable[[CoTraining | None], nn.Module]
    length: Length | None = None
    checkpoint: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_images(self.images)
        check_labels(self.labels, len(self.images), num_classes=self.num_classes)
        if self.images.shape[2] != self.images.shape[3]:
            raise ValueError(f"expected square images, got {tuple(self.images.shape[2:])}")
        if not 0 <= self.target < self.num_classes:
            raise ValueError(f"expected a target below {self.num_classes}, got {self.target}")

    @property
    def shape(self) -> dict[str, int]:
        """Image side and channels, as the triggers' settings call them."""
        return {"image_size": self.images.shape[3], "channels": self.images.shape[1]}


class Fitted(NamedTuple):
    """A trigger ready to poison with, and what its making came to (JSON values)."""

    trigger: nn.Module
    facts: dict[str, Any]


__all__ = ["FitContext", "Fitted", "Length"]
