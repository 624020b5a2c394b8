"""An input filter along the direction that best separates clean from triggered activations.

Ours: Neural Cleanse's own filter averages the neurons that the trigger excites most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.input_filters.detector import (
    CalibratedDetector,
    check_rate,
    conformal_threshold,
    two_halves,
)
from defense_nc.input_filters.feature_score import FeatureScore
from defense_nc.trigger import put_trigger
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.activations import last_linear, penultimate


@dataclass(frozen=True, kw_only=True)
class DiscriminantFilter:
    """Settings of the filter.

    Args:
        shrinkage: Share of the covariance that is replaced by a multiple of the identity, in
            (0, 1]: there are more neurons than a defender has images.
        false_positive_rate: Probability, at most, that a clean image is flagged, in (0, 1); half of
            the images must be as many as one over it.
    """

    name: ClassVar[str] = "discriminant-filter"
    shrinkage: float = 0.1
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"expected shrinkage in (0, 1], got {self.shrinkage}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> DiscriminantFilter:
        """Named settings with changes; "paper" and "fast" are the same."""
        return preset_of(cls, {"paper": {}, "fast": {}}, name, **changes)

    def calibrate(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
    ) -> CalibratedDetector:
        """Fit the direction on one half of the images, and the threshold on the other.

        The score is 0 for the mean clean image and 1 for the mean triggered one.

        Args:
            images: At least 40, of all classes; best such that the model was not trained on.
            triggers: The reversed trigger of one label. For several labels, make a filter each.

        Source: Fisher's linear discriminant with a shrunk covariance (Ledoit and Wolf's form, the
            share fixed).
        """
        check_images(images)
        if not triggers or len(triggers) != 1:
            raise ValueError(f"expected one reversed trigger, got {len(triggers or ())}")
        ((label, trigger),) = triggers.items()
        first, second = two_halves(images.to(last_linear(model).weight.device), seed)
        clean = penultimate(model, first).double().cpu()
        triggered = penultimate(model, quantize(put_trigger(trigger, first))).double().cpu()
        weight = _direction(clean, triggered, self.shrinkage)
        low, high = float((clean @ weight).mean()), float((triggered @ weight).mean())
        if not high > low:
            raise ValueError("expected a trigger that moves the classifier's activations")
        score = FeatureScore(model, weight / (high - low), -low / (high - low))
        return CalibratedDetector(
            self.name,
            conformal_threshold(score(second), self.false_positive_rate),
            tuple(images.shape[1:]),
            score,
            {
                "label": label,
                "images": len(second),
                "false_positive_rate": self.false_positive_rate,
            },
        )


def _direction(clean: Tensor, triggered: Tensor, shrinkage: float) -> Tensor:
    """Fisher's discriminant of two groups of activations ``(N, F)``: ``(F,)``."""
    centred = torch.cat([clean - clean.mean(0), triggered - triggered.mean(0)])
    covariance = centred.T @ centred / len(centred)
    size = len(covariance)
    ball = covariance.trace().clamp_min(1e-12) / size * torch.eye(size, dtype=covariance.dtype)
    mixed = (1 - shrinkage) * covariance + shrinkage * ball
    return torch.linalg.solve(mixed, triggered.mean(0) - clean.mean(0))
