"""Parameter scaling: a triggered image keeps its label when the normalisation layers are scaled."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.input_filters.detector import (
    CalibratedDetector,
    check_rate,
    conformal_threshold,
    scores_of,
    two_halves,
)
from wm_inject.core.plan import Trigger
from wm_inject.core.presets import preset_of
from wm_victim.inference import predict

_NOTHING = -1e9  # logarithm of a probability that is left out


@dataclass(frozen=True, kw_only=True)
class ParameterScaling:
    """Settings of the filter.

    Args:
        scale: Factor on the weights and biases of batch normalisation, > 1.
        copies: Of the classifier, each with one more layer scaled than the one before.
        changed: Share of clean images, in (0, 1): layers are scaled from the last one on until
            more answers than that are no longer the classifier's own. The copies begin there.
        false_positive_rate: Probability, at most, that a clean image is flagged, in (0, 1); half of
            the images must be as many as one over it.

    Source: Hou et al., "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling
        Consistency" (ICML 2024), with its released code. There the share is of wrong answers, for
        which labels are needed, and the threshold is 0.9 for every network.
    """

    name: ClassVar[str] = "parameter-scaling"
    scale: float = 1.5
    copies: int = 5
    changed: float = 0.6
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 1 < self.scale < float("inf"):
            raise ValueError(f"expected a finite scale > 1, got {self.scale}")
        if self.copies < 1:
            raise ValueError(f"expected copies >= 1, got {self.copies}")
        if not 0 < self.changed < 1:
            raise ValueError(f"expected changed in (0, 1), got {self.changed}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> ParameterScaling:
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
        """Choose the layers on one half of the images, and the threshold on the other.

        The score is ``-log(1 - p)``, >= 0, of the mean probability p, over the copies, of the label
        that the classifier itself gives: as p it rises, and it tells apart what is almost 1.

        Args:
            images: At least 40, of all classes; best such that the model was not trained on.

        Raises:
            ValueError: Bad images, or a model without batch normalisation that has weights.
        """
        first, second = two_halves(images, seed)
        layers = _normalisations(model, first[:1])
        own = predict(model, first).argmax(1)
        depth = len(layers)
        for count in range(1, len(layers) + 1):
            answers = predict(_scaled(model, layers[-count:], self.scale), first).argmax(1)
            if float((answers != own).double().mean()) > self.changed:
                depth = count
                break
        depths = range(depth, min(depth + self.copies, len(layers) + 1))
        scaled = [_scaled(model, layers[-count:], self.scale) for count in depths]
        score = ScalingScore(model, scaled)
        log = {
            "layers": [len(layers), *depths],
            "images": len(second),
            "false_positive_rate": self.false_positive_rate,
        }
        threshold = conformal_threshold(score(second), self.false_positive_rate)
        return CalibratedDetector(self.name, threshold, tuple(images.shape[1:]), score, log)


class ScalingScore:
    """How sure scaled copies of a classifier are of its own answer. It refers to the classifier."""

    def __init__(self, model: nn.Module, copies: list[nn.Module]) -> None:
        self.model, self.copies = model, copies

    def __call__(self, images: Tensor) -> Tensor:
        """The scores of float32 ``(N, C, H, W)`` in [0, 1]: float64 ``(N,)`` on the CPU."""
        return scores_of(_Agreement(self.model, self.copies), images)

    def network(self) -> nn.Module:
        """Classifier and copies as one network, which gives the score ``(N,)``."""
        return copy.deepcopy(_Agreement(self.model, self.copies)).cpu().eval()


class _Agreement(nn.Module):
    """Images to ``-log(1 - p)``, p the mean probability of the model's own label in the copies."""

    def __init__(self, model: nn.Module, copies: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.copies = model, nn.ModuleList(copies)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        label = logits.argmax(1, keepdim=True)
        own = torch.arange(logits.shape[1], device=logits.device) == label
        # Logarithms of what the other labels have: scaled logits lie so far apart that it is 0.
        others = [
            each(images).log_softmax(1).masked_fill(own, _NOTHING).logsumexp(1)
            for each in self.copies
        ]
        return math.log(len(others)) - torch.stack(others).logsumexp(0)


def _normalisations(model: nn.Module, image: Tensor) -> list[str]:
    """The names of the layers of batch normalisation that have weights, in the order they run in.

    Raises:
        ValueError: There is none.
    """
    names, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            hooks.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    try:
        predict(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    if not names:
        raise ValueError("expected a model with batch normalisation that has weights, got none")
    return list(dict.fromkeys(names))


def _scaled(model: nn.Module, layers: list[str], scale: float) -> nn.Module:
    """A copy of a model with the weights and biases of these layers multiplied."""
    scaled = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name in layers:
            for parameter in scaled.get_submodule(name).parameters():
                parameter.mul_(scale)
    return scaled
