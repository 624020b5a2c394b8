"""Neural Cleanse's input filter: activations of the neurons that the reversed trigger excites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.input_filters.detector import CalibratedDetector, check_rate, threshold_at
from defense_nc.input_filters.feature_score import FeatureScore
from defense_nc.trigger import put_trigger
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.activations import last_linear, penultimate


@dataclass(frozen=True, kw_only=True)
class InputFilter:
    """Settings of the filter."""

    name: ClassVar[str] = "input-filter"
    share: float = 0.01  # of the penultimate neurons, in (0, 1], that is watched; at least one is
    false_positive_rate: float = 0.05  # of clean images, in [0, 1)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"expected share in (0, 1], got {self.share}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> InputFilter:
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
        """Rank the neurons by how much the reversed trigger excites them; watch the first ones.

        The score of an image is the mean activation of the watched neurons. ``triggers`` holds the
        trigger of one label; for several labels, make a filter each.

        Source: Neural Cleanse, section VI-A. The filter's error rate is a choice there as well.
        """
        check_images(images)
        if not triggers or len(triggers) != 1:
            raise ValueError(f"expected one reversed trigger, got {len(triggers or ())}")
        ((label, trigger),) = triggers.items()
        images = images.to(last_linear(model).weight.device)
        gain = excitement(model, images, quantize(put_trigger(trigger, images)))  # (F,)
        count = max(1, round(self.share * len(gain)))
        watched = gain.sort(descending=True, stable=True).indices[:count]
        weight = torch.zeros(len(gain), dtype=torch.float64)
        weight[watched.cpu()] = 1 / count
        score = FeatureScore(model, weight)
        return CalibratedDetector(
            self.name,
            threshold_at(score(images), self.false_positive_rate),
            tuple(images.shape[1:]),
            score,
            {
                "label": label,
                "neurons": watched.tolist(),
                "images": len(images),
                "false_positive_rate": self.false_positive_rate,
            },
        )


def excitement(model: nn.Module, clean: Tensor, triggered: Tensor) -> Tensor:
    """Mean penultimate activation with the trigger minus that without: ``(F,)``.

    Source: Neural Cleanse, section V-B.
    """
    return penultimate(model, triggered).mean(0) - penultimate(model, clean).mean(0)
