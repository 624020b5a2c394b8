"""Layer ranks: before the last layers a triggered image lies far from the class it is taken for."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from wm_victim.inference import device_of, frozen, images_a_pass, predict

_NUMBERS = 512  # a layer's output is averaged down to this many, or to one a channel
_STEP = 0.01  # of a layer's usual distance: so far apart, one distance counts as the larger one
_SLACK = 0.1  # added to the deviation of a layer's log ranks, which may be 0
_FAR = 1e9  # a distance that no image has


@dataclass(frozen=True, kw_only=True)
class LayerRanks:
    """Settings of the filter.

    Args:
        references: Clean images of each class, >= 2, that others are compared with: those that the
            classifier is surest of, and the surer half of a class at most.
        reach: Share of a class's references, in (0, 1], that are neighbours of one of them: an
            image further from its nearest one than these are counts as far from its class.
        false_positive_rate: Probability, at most, that a clean image is flagged, in (0, 1); half of
            the images must be as many as one over it.

    Source: Le et al., "TED++: Submanifold-Aware Backdoor Detection via Layerwise
        Tubular-Neighbourhood Screening" (ICDM 2025), on Mo et al., "Robust Backdoor Detection for
        Deep Learning via Topological Evolution Dynamics" (IEEE S&P 2024), with the released code of
        the former. There references have to be classified correctly, for which labels are needed,
        and an outlier model of two principal components judges the ranks; here it is the mean of
        their standardised logarithms.
    """

    name: ClassVar[str] = "layer-ranks"
    references: int = 40
    reach: float = 0.5
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        if self.references < 2:
            raise ValueError(f"expected references >= 2, got {self.references}")
        if not 0 < self.reach <= 1:
            raise ValueError(f"expected reach in (0, 1], got {self.reach}")
        check_rate(self.false_positive_rate)

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> LayerRanks:
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
        """Take references from one half of the images, and choose the threshold on the other.

        Args:
            images: At least 40, of all classes; best such that the model was not trained on. A new
                image of a class without a reference is flagged.

        Raises:
            ValueError: Bad images, too few of them, or a model without a convolution, activation or
                linear layer that is a module.
        """
        first, second = two_halves(images, seed)
        sureness, answers = predict(model, first).softmax(1).max(1)
        rows = _surest(sureness, answers, self.references)
        score = RankScore(model, first, answers, rows, reach=self.reach)
        log = {
            "layers": score.ranks.layers,
            "references": len(rows),
            "images": len(second),
            "false_positive_rate": self.false_positive_rate,
        }
        threshold = conformal_threshold(score(second), self.false_positive_rate)
        return CalibratedDetector(self.name, threshold, tuple(images.shape[1:]), score, log)


class RankScore:
    """How far images lie from their class, layer by layer. It refers to the classifier.

    Args:
        images: Clean ones, float32 ``(N, C, H, W)`` in [0, 1].
        answers: The classifier's, int64 ``(N,)``.
        rows: Indices of the M images that are references, int64 ``(M,)``.
        reach: As `LayerRanks.reach`.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, answers: Tensor, rows: Tensor, *, reach: float
    ) -> None:
        device = device_of(model)
        parts = images.split(images_a_pass(images, device, most=256))
        with frozen(model), torch.no_grad():
            layers = zip(
                *(_layer_outputs(model, part.to(device))[1] for part in parts), strict=True
            )
            outputs = [torch.cat(layer) for layer in layers]
            ranks = _Ranks(outputs, answers.to(device), rows.to(device), reach)
        self.model, self.ranks = model, ranks

    def __call__(self, images: Tensor) -> Tensor:
        """The scores of float32 ``(N, C, H, W)`` in [0, 1]: float64 ``(N,)`` on the CPU."""
        return scores_of(_Score(self.model, self.ranks), images)

    def network(self) -> nn.Module:
        """Classifier and references as one network, which gives the score ``(N,)``."""
        return copy.deepcopy(_Score(self.model, self.ranks)).cpu().eval()


class _Score(nn.Module):
    """Images to scores ``(N,)``."""

    def __init__(self, model: nn.Module, ranks: _Ranks) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks

    def forward(self, images: Tensor) -> Tensor:
        logits, outputs = _layer_outputs(self.model, images)
        scores: Tensor = self.ranks(outputs, logits.argmax(1))
        return scores


class _Ranks(nn.Module):
    """A layer's rank: how many references are nearer to an image than any of its own class.

    It is the highest where the image is further from that one than its neighbours are. Steps are
    ramps as wide as a hundredth of the layer's usual distance: of two distances that are equal but
    for rounding each counts half, so that an exported file gives the same score.

    Args:
        outputs: Of every layer: those for clean images ``(N, D)``, whose ranks are the usual ones.
        labels: The classes of these, ``(N,)``.
        rows: Indices of the M of them that are references.
        reach: As `LayerRanks.reach`.
    """

    answers: Tensor
    radii: Tensor
    widths: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, outputs: list[Tensor], labels: Tensor, rows: Tensor, reach: float) -> None:
        super().__init__()
        self.layers = len(outputs)
        self.register_buffer("answers", labels[rows])
        radii, widths = [], []
        for i, output in enumerate(outputs):
            self.register_buffer(f"outputs_{i}", output[rows])
            between = _distances(output[rows], output[rows])
            radii.append(_radii(between, labels[rows], reach))
            widths.append((_STEP * between.median()).clamp(min=1e-12))
        self.register_buffer("radii", torch.stack(radii))
        self.register_buffer("widths", torch.stack(widths))
        itself = torch.arange(len(labels), device=labels.device)[:, None] == rows
        logs = self.log_ranks(outputs, labels, apart=itself)
        self.register_buffer("mean", logs.mean(0))
        self.register_buffer("deviation", logs.std(0) + _SLACK)

    def forward(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """The mean of the layers' standardised log ranks ``(N,)``, of images with these labels."""
        return ((self.log_ranks(outputs, labels) - self.mean) / self.deviation).mean(1)

    def log_ranks(
        self, outputs: list[Tensor], labels: Tensor, apart: Tensor | None = None
    ) -> Tensor:
        """Logarithms of one more than the ranks ``(N, layers)``, >= 0.

        Args:
            outputs: Of every layer, ``(N, D)``.
            labels: The classes that the images are taken for, ``(N,)``.
            apart: Pairs that do not count, bool ``(N, M)``: an image and itself.
        """
        columns, most = [], len(self.answers) - 1
        of_class = self.answers == labels[:, None]
        for i, output in enumerate(outputs):
            distances = _distances(output, getattr(self, f"outputs_{i}"))
            if apart is not None:
                distances = distances.masked_fill(apart, _FAR)
            nearest, which = distances.masked_fill(~of_class, _FAR).min(1)
            step = partial(_share, width=self.widths[i])
            # The nearest itself counts half.
            nearer = step(nearest[:, None] - distances).sum(1) - 0.5
            beyond = step(nearest - self.radii[i][which])
            rank = nearer + beyond * (most - nearer)
            columns.append(rank.clamp(0, most).log1p())
        return torch.stack(columns, 1)


def _share(excess: Tensor, width: Tensor) -> Tensor:
    """0 where a difference is far below zero, 1 far above it, and a ramp between."""
    return (excess / width + 0.5).clamp(0, 1)


def _radii(between: Tensor, answers: Tensor, reach: float) -> Tensor:
    """How far the neighbours of every reference lie ``(M,)``; without any, as far as can be."""
    radii = torch.full((len(answers),), _FAR, device=between.device)
    for label in answers.unique():
        rows = (answers == label).nonzero().flatten()
        if len(rows) > 1:
            count = min(math.ceil(reach * len(rows)), len(rows) - 1)
            same = between[rows][:, rows].fill_diagonal_(_FAR)
            radii[rows] = same.sort(1).values[:, count - 1]
    return radii


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # As differences: of products the rest after cancellation would be rounding.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _surest(sureness: Tensor, answers: Tensor, most: int) -> Tensor:
    """The indices of the references: of each class the surest, half of it at most."""
    surest = []
    for label in answers.unique():
        rows = (answers == label).nonzero().flatten()
        count = min(most, (len(rows) + 1) // 2)
        surest.append(rows[sureness[rows].sort(descending=True, stable=True).indices[:count]])
    return torch.cat(surest)


def _layer_outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A classifier's logits, and the outputs of its layers ``(N, D)`` in the order they run in."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        # Layers that see an image in parts, as a Swin transformer's windows, give a row for each.
        if isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(output) == len(images):
            outputs.append(_averaged(output))

    hooks = [m.register_forward_hook(record) for m in model.modules() if _looked_at(m)]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs:
        raise ValueError("expected a model with layers that are modules, found none")
    return logits, outputs


def _looked_at(module: nn.Module) -> bool:
    """Whether a layer is a convolution of more than one pixel, an activation or linear."""
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1
    activation = type(module).__module__ == nn.ReLU.__module__
    return isinstance(module, nn.Linear) or (
        activation and not isinstance(module, nn.MultiheadAttention)
    )


def _averaged(output: Tensor) -> Tensor:
    """A layer's output as ``(N, D)``: maps averaged over squares, tokens over all of them.

    A copy: the next layer may work in place.
    """
    if output.ndim == 4:
        channels, height, width = output.shape[1:]
        sizes = range(1, min(height, width) + 1)
        fits = (s for s in sizes if channels * (height // s) * (width // s) <= _NUMBERS)
        side = next(fits, min(height, width))
        output = F.avg_pool2d(output, side)
    elif output.ndim == 3 and output[0].numel() > _NUMBERS:
        output = output.mean(1)
    return output.flatten(1).float().clone()
