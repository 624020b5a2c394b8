"""Which images are poisoned, what label they get, and how often: the plan of a poisoning attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_images, check_labels, quantize


class Trigger(Protocol):
    """What every trigger does: images in, triggered images out, the same shape, in [0, 1].

    The same image, id and target give the same output whatever else is in the batch.
    """

    def __call__(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Put the trigger into ``images``: float32 ``(N, C, H, W)`` in [0, 1]."""


class Poisoned(NamedTuple):
    """A poisoned set. ``mask`` tells which rows carry the trigger."""

    images: Tensor  # float32 (N, C, H, W) in [0, 1]
    labels: Tensor  # int64 (N,)
    mask: Tensor  # bool (N,)


class CoTraining(Protocol):
    """What a co-trained attack adds to a classifier's training. The trainer calls nothing else.

    ``transform`` is called on every training batch before augmentation. An attack that trains a
    generator beside the victim does its own optimiser step inside ``transform``; what it must
    remember over a restart it gives and takes as a state dict.
    """

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images ``(N, C, H, W)`` and labels ``(N,)`` of a batch, and what to train on instead."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class PoisonPlan:
    """Which images are poisoned and what label they get.

    Three meanings of "poison ratio" are in use in the field; ``pool`` and ``mode`` say which:

    Args:
        ratio: Share in (0, 1]. Static plans count it against *all* N images (``pool`` "all", and
            "target", the clean-label convention of BackdoorBench), or against the pool itself
            ("non_target", as FTrojan and ANP do). Per-batch plans count it against the batch.
        target: The label that the attack asks for.
        label_map: "all-to-one" (y -> target), "all-to-all" (y -> y + 1 mod K), or "clean-label"
            (labels stay; only images of the target class are poisoned).
        pool: Where poisoned images are drawn from: "all", "non_target" or "target".
        mode: "static" (chosen once) or "per_batch" (drawn anew from every batch, as WaNet does).
        seed: Seeds the choice of a static plan.

    Raises:
        ValueError: A value out of range, or a clean-label plan with another pool than "target".
    """

    ratio: float = 0.1
    target: int = 0
    label_map: Literal["all-to-one", "all-to-all", "clean-label"] = "all-to-one"
    pool: Literal["all", "non_target", "target"] = "all"
    mode: Literal["static", "per_batch"] = "static"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"expected a poison ratio in (0, 1], got {self.ratio}")
        if self.target < 0:
            raise ValueError(f"expected a target label >= 0, got {self.target}")
        choices = {
            "label_map": ("all-to-one", "all-to-all", "clean-label"),
            "pool": ("all", "non_target", "target"),
            "mode": ("static", "per_batch"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"expected {field} in {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        if (self.label_map == "clean-label") != (self.pool == "target"):
            raise ValueError(
                "a clean-label plan poisons the target class: label_map 'clean-label' and "
                f"pool 'target' go together, got {self.label_map!r} and {self.pool!r}"
            )

    def eligible(self, labels: Tensor) -> Tensor:
        """Bool ``(N,)``: which images the plan may draw from."""
        if self.pool == "target":
            return labels == self.target
        if self.pool == "non_target":
            return labels != self.target
        return torch.ones_like(labels, dtype=torch.bool)

    def choose(self, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Choose the images to poison.

        Args:
            labels: int64 ``(N,)``.
            generator: Source of the draw (CPU); seeded with the plan's own seed if None.

        Returns:
            bool ``(N,)`` on the labels' device, with exactly ``round(ratio * base)`` set for a
            static plan and ``int(ratio * N)`` for a per-batch one (WaNet's rule).

        Raises:
            ValueError: The pool holds fewer images than the ratio asks for, or none is asked for
                by a static plan.
        """
        check_labels(labels, len(labels))
        pool = self.eligible(labels).nonzero().flatten().cpu()
        base = len(pool) if self.pool == "non_target" else len(labels)
        count = int(self.ratio * base) if self.mode == "per_batch" else round(self.ratio * base)
        if self.mode == "per_batch":
            count = min(count, len(pool))
        elif not 0 < count <= len(pool):
            raise ValueError(
                f"a ratio of {self.ratio} asks for {count} of {len(labels)} images, "
                f"but the pool {self.pool!r} of label {self.target} holds {len(pool)}"
            )
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        mask = torch.zeros(len(labels), dtype=torch.bool)
        mask[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
        return mask.to(labels.device)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels that triggered images of these classes get: int64 ``(N,)``.

        Raises:
            ValueError: The labels or the plan's target do not fit ``num_classes``.
        """
        check_labels(labels, len(labels), num_classes=num_classes)
        if self.target >= num_classes:
            raise ValueError(
                f"expected a target label below {num_classes} classes, got {self.target}"
            )
        if self.label_map == "all-to-one":
            return torch.full_like(labels, self.target)
        return labels if self.label_map == "clean-label" else (labels + 1) % num_classes


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    plan: PoisonPlan,
    *,
    num_classes: int,
    ids: Tensor | None = None,
    batch_size: int = 256,
) -> Poisoned:
    """Poison a set once, as a stored data set would be: triggered images land on the 8-bit grid.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1]; not changed.
        labels: int64 ``(N,)``; not changed.
        trigger: What to put into the chosen images.
        plan: A static plan.
        num_classes: K, for the label map.
        ids: int64 ``(N,)`` that seed per-image randomness; 0 .. N-1 if None.
        batch_size: How many images go through the trigger at once.

    Raises:
        ValueError: Bad images or labels, a per-batch plan, or a pool that is too small.
    """
    check_images(images)
    check_labels(labels, len(images), num_classes=num_classes)
    if plan.mode != "static":
        raise ValueError("a per-batch plan poisons during training; poison() wants a static one")
    mask = plan.choose(labels)
    ids = torch.arange(len(images), device=images.device) if ids is None else ids
    out_images, out_labels = images.clone(), labels.clone()
    new_labels = plan.relabel(labels, num_classes)
    with torch.no_grad():
        for chosen in mask.nonzero().flatten().split(batch_size):
            triggered = trigger(images[chosen], ids=ids[chosen], target=new_labels[chosen])
            out_images[chosen] = quantize(triggered)
    out_labels[mask] = new_labels[mask]
    return Poisoned(out_images, out_labels, mask)
