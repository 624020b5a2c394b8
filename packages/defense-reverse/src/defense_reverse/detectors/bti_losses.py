"""BTI-DBF's settings and losses: keep the benign features, change whatever is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from defense_reverse.detectors.common import check_settings
from defense_reverse.detectors.split import Part
from wm_inject.core.presets import preset_of


@dataclass(frozen=True)
class BtiDbfConfig:
    """Settings of BTI-DBF's inversion. The defaults are the preset "fast".

    "paper" is the released code for 5 % of CIFAR-10: 20, 50 and 30 passes over 2,500 images. In
    "fast" the generator is narrow and residual, so that it has nothing to learn before the
    inversion, and the mask, which needs no image twice, has as many steps as there.
    """

    name: str = "fast"  # the preset's, for the record
    width: int = 8  # this and the next three: settings of `UNetGenerator`
    depth: int = 2
    convs: int = 1
    residual: bool = True
    mask_steps: int = 400  # that separate benign features from the others
    pretrain_steps: int = 0  # that keep image, features and prediction; none are taken if residual
    steps: int = 300  # of the inversion
    batch_size: int = 64
    mask_lr: float = 1e-2  # Adam's, for the mask
    lr: float = 1e-3  # Adam's, for the generator
    # Mean squared change of normalised images, above which nothing else counts.
    image_bound: float = 0.3
    benign_bound: float = 3.0  # the same for the benign features
    benign_weight: float = 0.01  # of their change below the bound
    noise: float = 0.03  # deviation, in units of the normalisation, on the images that are counted
    # Share of the other classes' images that must reach the most frequent label before it is called
    # a target, in (0, 1].
    min_share: float = 0.9

    def __post_init__(self) -> None:
        check_settings(
            self,
            ("width", "depth", "convs", "mask_steps", "steps", "batch_size"),
            ("mask_lr", "lr", "image_bound", "benign_bound"),
        )
        for field in ("pretrain_steps", "benign_weight", "noise"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"expected {field} >= 0, got {getattr(self, field)}")
        if not 0 < self.min_share <= 1:
            raise ValueError(f"expected min_share in (0, 1], got {self.min_share}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> BtiDbfConfig:
        """Settings by name ("paper" or "fast"), with changes."""
        return preset_of(cls, PRESETS, name, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "name": "paper",
        "width": 32,
        "depth": 4,
        "convs": 2,
        "residual": False,
        "pretrain_steps": 1000,
        "steps": 600,
        "batch_size": 128,
    },
    "fast": {},
}


class Changes(NamedTuple):
    """What a batch of generated images changes, each a mean of squares."""

    image: Tensor  # of normalised images
    benign: Tensor  # of the features where the mask is
    backdoor: Tensor  # of the features where it is not

    def numbers(self) -> dict[str, float]:
        """Ready for JSON."""
        return {name: float(value) for name, value in self._asdict().items()}


def decoupling_loss(head: Part, features: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Right with the masked features, wrong with the others."""
    benign = F.cross_entropy(head(mask * features), labels)
    return benign - F.cross_entropy(head((1 - mask) * features), labels)


def feature_changes(clean: Tensor, generated: Tensor, mask: Tensor, image: Tensor) -> Changes:
    """Split the change of features ``(N, ...)`` by a mask ``(...)``; pass ``image`` through."""
    return Changes(
        image=image,
        benign=F.mse_loss(mask * generated, mask * clean),
        backdoor=F.mse_loss((1 - mask) * generated, (1 - mask) * clean),
    )


def inversion_loss(changes: Changes, config: BtiDbfConfig) -> Tensor:
    """Change the other features; above either bound, mend the image and nothing else."""
    if (
        float(changes.image.detach()) > config.image_bound
        or float(changes.benign.detach()) > config.benign_bound
    ):
        return changes.image
    return config.benign_weight * changes.benign - changes.backdoor


def pretraining_loss(clean: Tensor, logits: Tensor, features: Tensor, image: Tensor) -> Tensor:
    """Keep the prediction, the features and the image.

    ``features`` and ``image`` are mean squared changes; the image's weighs 100 above 0.1, else
    0.01. ``clean`` are the logits ``(N, K)`` of the clean images.
    """
    weight = 100 if float(image.detach()) > 0.1 else 0.01
    return F.cross_entropy(logits, clean.softmax(1)) + features + weight * image
