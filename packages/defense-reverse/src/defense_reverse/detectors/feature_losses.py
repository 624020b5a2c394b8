"""FeatureRE's settings and losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from defense_reverse.detectors.common import check_settings
from wm_inject.core.presets import preset_of


@dataclass(frozen=True)
class FeatureREConfig:
    """Settings of FeatureRE. The defaults are the preset "fast".

    "paper" is the released code for 1 % of CIFAR-10: 100 and 400 passes over 500 images in two
    batches each. "fast" takes fewer and larger steps with a narrow residual generator, so that ten
    labels take about twenty seconds on one CPU thread.
    """

    name: str = "fast"  # the preset's, for the record
    width: int = 8  # this and the next three: settings of `UNetGenerator`
    depth: int = 2
    convs: int = 1
    residual: bool = True
    warmup_steps: int = 20  # that only reach the label, with no mask yet
    steps: int = 120  # of the search proper, for generator and mask in turn
    round_steps: int = 10  # that one score averages; the paper's epoch
    batch_size: int = 16
    lr: float = 1e-2  # Adam's, for the generator
    mask_lr: float = 0.3  # Adam's, for the mask
    betas: tuple[float, float] = (0.5, 0.9)  # of both
    image_bound: float = 0.15  # largest mean squared change of normalised images at no cost
    mask_share: float = 0.03  # largest share of the features in the mask at no cost, in (0, 1]
    spread_bound: float = 1.0  # largest deviation of the masked features between images at no cost
    success_floor: float = 0.9  # share of a batch that must reach the label, in (0, 1]
    threshold: float = -0.75  # a label whose score is below is a backdoor's

    def __post_init__(self) -> None:
        check_settings(
            self,
            ("width", "depth", "convs", "steps", "round_steps"),
            ("lr", "mask_lr", "image_bound", "spread_bound"),
        )
        if self.warmup_steps < 0 or self.batch_size < 2:
            raise ValueError(
                "expected warmup_steps >= 0 and batch_size >= 2, "
                f"got {self.warmup_steps}, {self.batch_size}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        for field in ("mask_share", "success_floor"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"expected {field} in (0, 1], got {getattr(self, field)}")
        if not -2 <= self.threshold <= 0:
            raise ValueError(f"expected a threshold in [-2, 0], got {self.threshold}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> FeatureREConfig:
        """Settings by name ("paper" or "fast"), with changes."""
        return preset_of(cls, PRESETS, name, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "name": "paper",
        "width": 32,
        "depth": 4,
        "convs": 2,
        "residual": False,
        "warmup_steps": 200,
        "steps": 800,
        "round_steps": 2,
        "batch_size": 256,
        "lr": 1e-3,
        "mask_lr": 0.1,
    },
    "fast": {},
}


class Terms(NamedTuple):
    """What the losses are made of, for one batch or as the mean of one round."""

    similarity: Tensor  # cosine of mean generated and mean target-class features, in [-1, 1]
    success: Tensor  # share that reaches the label through the mask
    attack: Tensor  # cross-entropy towards the label
    change: Tensor  # mean squared change of normalised images
    spread: Tensor  # deviation of the masked features from image to image
    mask_norm: Tensor  # sum of the mask

    def numbers(self) -> dict[str, float]:
        """Ready for JSON."""
        return {name: float(value) for name, value in self._asdict().items()}


class Excess(NamedTuple):
    """By how much a round exceeds each bound, as a share of the bound; 0 within it."""

    change: float = 0.0
    spread: float = 0.0
    success: float = 0.0
    mask_norm: float = 0.0


def similarity(features: Tensor, class_mean: Tensor) -> Tensor:
    """Cosine between the mean of features ``(N, ...)`` and a class's mean features ``(...)``."""
    return F.cosine_similarity(features.mean(0).flatten(), class_mean.flatten(), dim=0)


def masked_spread(features: Tensor, mask: Tensor) -> Tensor:
    """Deviation of features ``(N, ...)`` over the batch, as a mean weighted by the mask."""
    correction = min(1, len(features) - 1)  # a single image does not spread
    return (features * mask).std(0, correction=correction).sum() / mask.sum()


def mix(features: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Generated features where the mask is, those of other clean images elsewhere."""
    return mask * features + (1 - mask) * reference


def warmup_loss(attack: Tensor, change: Tensor, config: FeatureREConfig) -> Tensor:
    """Reach the label; a change above its bound costs a hundred times its size."""
    return attack + 100 * change if float(change.detach()) > config.image_bound else attack


def generator_loss(terms: Terms, config: FeatureREConfig, previous: Excess) -> Tensor:
    """Move away from the target class's own features; each bound exceeded costs its term.

    Terms that the round before exceeded (``previous``) weigh more.
    """
    loss = 5 * terms.similarity.clamp(min=0)
    if float(terms.spread.detach()) > config.spread_bound:
        loss = loss + 10 * (1 + previous.spread) * terms.spread
    if float(terms.change.detach()) > config.image_bound:
        loss = loss + 10 * (1 + previous.change) * terms.change
    if float(terms.success) < config.success_floor:
        loss = loss + (1 + previous.success) * terms.attack
    return loss


def mask_loss(attack: Tensor, mask: Tensor, config: FeatureREConfig) -> Tensor:
    """Reach the label through the mask; a mask above its bound costs its sum."""
    norm = mask.sum()
    return attack + norm if float(norm.detach()) > mask_bound(mask, config) else attack


def mask_bound(mask: Tensor, config: FeatureREConfig) -> int:
    """The largest sum of a mask that costs nothing, at least 1."""
    return max(1, int(mask.numel() * config.mask_share))


def excess(terms: Terms, mask: Tensor, config: FeatureREConfig) -> Excess:
    """How far a round is beyond each bound."""

    def over(value: Tensor, bound: float) -> float:
        return max(0.0, float(value) - bound) / bound

    return Excess(
        change=over(terms.change, config.image_bound),
        spread=over(terms.spread, config.spread_bound),
        success=max(0.0, config.success_floor - float(terms.success)) / config.success_floor,
        mask_norm=over(terms.mask_norm, mask_bound(mask, config)),
    )


def score(terms: Terms, excess: Excess) -> float:
    """Similarity - success + relative violations: -1 and less is a trigger unlike its class."""
    violations = excess.change + excess.mask_norm + excess.spread
    return float(terms.similarity) - float(terms.success) + violations


def round_mean(batches: list[Terms]) -> Terms:
    """The means over the batches of a round."""
    return Terms(*(torch.stack(values).mean() for values in zip(*batches, strict=True)))
