"""Which images are poisoned, what label they get, and how often: the plan of a poisoning attack.

A plan is index arithmetic in numpy; torch is imported only where tensors come in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from wm_inject.core.checks import check_choice
from wm_inject.core.images import check_images, check_labels, quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Labels = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
LabelMap = Literal["all-to-one", "all-to-all", "source-specific", "clean-label"]
Pool = Literal["all", "non_target", "target"]
Mode = Literal["static", "per_batch"]
_CHOICES = {
    "label_map": ("all-to-one", "all-to-all", "source-specific", "clean-label"),
    "pool": ("all", "non_target", "target"),
    "mode": ("static", "per_batch"),
}
_Vector = TypeVar("_Vector", "Tensor", "Labels")


class Trigger(Protocol):
    """What every trigger does: images in, triggered images out, of the same shape and range.

    The same image, id and target give the same output whatever else is in the batch.
    """

    def __call__(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Put the trigger into ``images``."""


class Poisoned(NamedTuple):
    """A poisoned set. ``mask`` tells which rows carry the trigger."""

    images: Tensor  # float32 (N, C, H, W) in [0, 1]
    labels: Tensor  # int64 (N,)
    mask: Tensor  # bool (N,)


class CoTraining(Protocol):
    """What a co-trained attack adds to a classifier's training. The trainer calls nothing else.

    ``transform`` is called on every training batch before augmentation. An attack that trains a
    generator beside the victim takes its own optimiser step in it.
    """

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images and labels to train on in place of a batch's; every draw is ``generator``'s."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class PoisonPlan:
    """Which images are poisoned and what label they get.

    Three meanings of "poison ratio" are in use in the field; ``pool`` and ``mode`` say which:

    Args:
        ratio: Share in (0, 1]; the whole pool if None. Static plans count it against *all* N images
            (``pool`` "all", and "target", the clean-label convention of BackdoorBench), or against
            the pool itself ("non_target", as FTrojan and ANP do). Per-batch plans count it against
            the batch.
        target: The class that the attack asks for.
        label_map: "all-to-one" (y -> target), "all-to-all" (y -> y + 1 mod K), "source-specific"
            (``source`` -> target; as many images of the other classes carry the trigger too and
            keep their labels), or "clean-label" (labels stay; only images of the target class are
            poisoned).
        pool: Where poisoned images are drawn from: "all", "non_target" or "target".
        mode: "static" (chosen once) or "per_batch" (drawn anew from every batch, as WaNet does).
        source: The class whose images get the target label, of a source-specific plan; ``ratio`` is
            the share of all images that do.

    Raises:
        ValueError: A value out of range, a clean-label plan with another pool than "target", or a
            source-specific one without a source, with another pool than "all", or per batch.
    """

    ratio: float | None = 0.1
    target: int = 0
    label_map: LabelMap = "all-to-one"
    pool: Pool = "all"
    mode: Mode = "static"
    seed: int = 0
    source: int | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"expected a poison ratio in (0, 1], got {self.ratio}")
        if self.target < 0:
            raise ValueError(f"expected a target label >= 0, got {self.target}")
        for field, allowed in _CHOICES.items():
            check_choice(field, getattr(self, field), allowed)
        if (self.label_map == "clean-label") != (self.pool == "target"):
            raise ValueError(
                "a clean-label plan poisons the target class: label_map 'clean-label' and "
                f"pool 'target' go together, got {self.label_map!r} and {self.pool!r}"
            )
        specific = self.label_map == "source-specific"
        if specific != (self.source is not None):
            raise ValueError(
                "a source and label_map 'source-specific' go together, "
                f"got {self.source} and {self.label_map!r}"
            )
        if specific and (self.pool != "all" or self.mode != "static"):
            raise ValueError(
                "expected a source-specific plan to be static and to draw from all classes, "
                f"got {self.mode!r} and pool {self.pool!r}"
            )
        if self.source is not None and (self.source < 0 or self.source == self.target):
            raise ValueError(
                f"expected a source >= 0 other than the target {self.target}, got {self.source}"
            )
        if self.seed < 0:
            raise ValueError(f"expected a seed >= 0, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; a plan without a source has none here either."""
        return {
            name: value for name, value in asdict(self).items() if (name, value) != ("source", None)
        }

    def eligible(self, labels: _Vector) -> Any:
        """Bool ``(N,)`` of the labels' kind: which images the plan may draw from."""
        if self.pool == "target":
            return labels == self.target
        if self.pool == "non_target":
            return labels != self.target
        return labels >= 0

    def choose(self, labels: _Vector, *, generator: torch.Generator | None = None) -> Any:
        """Choose the images to poison: bool ``(N,)``, of the kind of the labels, tensor or array.

        Exactly ``round(ratio * base)`` are set for a static plan and ``int(ratio * N)`` for a
        per-batch one (WaNet's rule); a source-specific plan sets as many again of other classes, or
        all of them where there are fewer. A tensor and an array of the same labels have the same
        choice. The draw comes from ``generator``, on the CPU, or from the plan's own seed.

        Raises:
            ValueError: The pool holds fewer images than the ratio asks for, or none is asked for
                by a static plan.
        """
        if not isinstance(labels, np.ndarray):
            import torch

            check_labels(labels, len(labels))
            mask = self._choose(labels.cpu().numpy(), generator)
            return torch.from_numpy(mask).to(labels.device)
        if labels.dtype != np.int64 or labels.ndim != 1 or not len(labels) or labels.min() < 0:
            got = f"{labels.dtype} {labels.shape}"
            raise ValueError(f"expected labels as int64 (N,), each >= 0, got {got}")
        return self._choose(labels, generator)

    def relabel(self, labels: _Vector, num_classes: int) -> _Vector:
        """The labels that triggered images of these classes get: int64 ``(N,)``.

        Raises:
            ValueError: The labels or the plan's target do not fit ``num_classes``.
        """
        if not isinstance(labels, np.ndarray):
            check_labels(labels, len(labels), num_classes=num_classes)
        if self.target >= num_classes:
            raise ValueError(
                f"expected a target label below {num_classes} classes, got {self.target}"
            )
        if self.label_map == "all-to-one":
            return labels * 0 + self.target
        if self.source is not None:
            return labels + (labels == self.source) * (self.target - labels)
        return labels if self.label_map == "clean-label" else (labels + 1) % num_classes

    def _choose(self, labels: Labels, generator: torch.Generator | None) -> Mask:
        if self.source is not None:
            pool = np.flatnonzero(labels == self.source)
        else:
            pool = np.flatnonzero(self.eligible(labels))
        base = len(pool) if self.pool == "non_target" else len(labels)
        if self.ratio is None:
            count = len(pool)
        elif self.mode == "per_batch":
            count = min(int(self.ratio * base), len(pool))
        else:
            count = round(self.ratio * base)
        if self.mode == "static" and not 0 < count <= len(pool):
            raise ValueError(
                f"a ratio of {self.ratio or 1} asks for {count} of {len(labels)} images, "
                f"but {self._pool_name} holds {len(pool)}"
            )
        mask = np.zeros(len(labels), dtype=np.bool_)
        mask[pool[_draw(len(pool), count, self.seed, generator)]] = True
        if self.source is not None:
            others = np.flatnonzero(labels != self.source)
            covered = min(count, len(others))
            mask[others[_draw(len(others), covered, self.seed + 1, generator)]] = True
        return mask

    @property
    def _pool_name(self) -> str:
        if self.source is not None:
            return f"class {self.source}"
        return f"the pool {self.pool!r} of label {self.target}"


def _draw(size: int, count: int, seed: int, generator: torch.Generator | None) -> Labels:
    """The first ``count`` of a permutation, the same numbers as ``torch.randperm``'s."""
    if generator is not None:
        import torch

        order: Labels = torch.randperm(size, generator=generator)[:count].numpy()
        return order
    # torch's generator is the Mersenne Twister, of which it takes the seed's lower 32 bits, and
    # randperm is Fisher and Yates' shuffle from the front.
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    order = np.arange(size)
    for place, bits in enumerate(twister.randint(2**32, size=count, dtype=np.uint32).tolist()):
        other = place + bits % (size - place)
        order[[place, other]] = order[[other, place]]
    return order[:count]


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

    ``plan`` is a static one; ``ids`` are 0 .. N-1 if None.

    Raises:
        ValueError: Bad images or labels, a per-batch plan, or a pool that is too small.
    """
    import torch

    check_images(images)
    check_labels(labels, len(images), num_classes=num_classes)
    if plan.mode != "static":
        raise ValueError("a per-batch plan poisons during training; poison() needs a static one")
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
