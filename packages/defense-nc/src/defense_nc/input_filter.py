"""Neural Cleanse's input filter: the neurons that the reversed trigger excites give it away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.feature_score import FeatureScore
from defense_nc.input_detector import CalibratedDetector, check_rate, threshold_at
from defense_nc.neurons import excitement, put_trigger
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger
from wm_victim.activations import last_linear


@dataclass(frozen=True, kw_only=True)
class InputFilter:
    """Settings of the filter.

    Args:
        share: Share of the penultimate neurons that are watched, in (0, 1]; at least one is.
        false_positive_rate: Share of clean images that may be held to be triggered, in [0, 1).

    Raises:
        ValueError: A value outside its range.
    """

    share: float = 0.01
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"expected share in (0, 1], got {self.share}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "small", **changes: Any) -> InputFilter:
        """The settings of this name, small or paper (here the same), with some of them changed.

        Raises:
            ValueError: No such preset, or a value outside its range.
        """
        if name not in ("small", "paper"):
            raise ValueError(f"expected a preset in small, paper, got {name!r}")
        return cls(**changes)

    @property
    def name(self) -> str:
        """What it is called in records and tables."""
        return "input-filter"

    def calibrate(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
    ) -> CalibratedDetector:
        """Find the neurons that the reversed trigger excites, and how much clean images do.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; not changed, and kept for scoring.
            images: Clean float32 ``(N, C, H, W)`` in [0, 1].
            triggers: The reversed trigger of one label. For several labels, make a filter each.
            seed: Not used: nothing is drawn.

        Returns:
            The filter: its score is the mean activation of the watched neurons.

        Raises:
            ValueError: Bad images, a model without a linear layer, or not exactly one trigger.

        Source: Neural Cleanse, section VI-A. The filter's error rate is a choice there as well.
        """
        check_images(images)
        if not triggers or len(triggers) != 1:
            raise ValueError(f"expected one reversed trigger, got {len(triggers or ())}")
        ((label, trigger),) = triggers.items()
        layer = last_linear(model)
        images = images.to(layer.weight.device)
        gain = excitement(model, images, quantize(put_trigger(trigger, images)))  # (F,)
        count = max(1, round(self.share * len(gain)))
        watched = gain.sort(descending=True, stable=True).indices[:count]
        weight = torch.zeros(len(gain), dtype=torch.float64)
        weight[watched.cpu()] = 1 / count
        suspicion = FeatureScore(model, weight)
        return CalibratedDetector(
            self.name,
            threshold_at(suspicion(images), self.false_positive_rate),
            tuple(images.shape[1:]),
            suspicion,
            {
                "label": label,
                "neurons": watched.tolist(),
                "images": len(images),
                "false_positive_rate": self.false_positive_rate,
            },
        )
