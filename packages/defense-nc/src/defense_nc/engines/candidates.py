"""What both engines share: starting points, candidates and the final choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.gradients import reached
from defense_nc.trigger import InvertedTrigger, compose
from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import predict

# tanh / (2 - epsilon) + 1/2, as in the original; the PyTorch ports have 2 + epsilon.
_EPSILON = 1e-7
_FAINT = 0.2  # a faint mask starts below this


class Candidate(NamedTuple):
    """A mask and a pattern on the way of a search."""

    norm: float
    mask: Tensor  # (1, H, W)
    pattern: Tensor  # (C, H, W)
    succeeded: bool  # whether its step's success reached the threshold


def draw(start: str, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The free mask ``(1, H, W)`` and pattern ``(C, H, W)`` before the first step."""
    channels, height, width = shape
    sizes = ((1, height, width), (channels, height, width))
    if start == "ones":
        return torch.ones(sizes[0]), torch.ones(sizes[1])
    # In double precision the ends of the range stay finite.
    mask, pattern = (torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    if start == "faint":
        mask *= _FAINT
    return _free(mask), _free(pattern)


def _free(value: Tensor) -> Tensor:
    return torch.atanh((value - 0.5) * (2 - _EPSILON)).float()


def squash(theta: Tensor) -> Tensor:
    """A free value as one in (0, 1), or a rounding error beyond."""
    return torch.tanh(theta) / (2 - _EPSILON) + 0.5


def candidate(theta_mask: Tensor, theta_pattern: Tensor, succeeded: bool) -> Candidate:
    """The current mask and pattern, clamped to [0, 1]."""
    mask, pattern = (squash(t.detach()).clamp(0, 1) for t in (theta_mask, theta_pattern))
    return Candidate(float(mask.sum()), mask, pattern, succeeded)


def conclude(
    model: nn.Module, images: Tensor, target: int, candidates: list[Candidate], *, floor: float
) -> InvertedTrigger:
    """The smallest candidate that reaches the floor on all images, or the smallest, as a trigger.

    Judged in float32, whatever the search was computed in.
    """
    # A search that never succeeded has a norm as well: it comes last.
    candidates = sorted(candidates, key=lambda one: (not one.succeeded, one.norm))
    rates: list[float] = []
    for mask, pattern in ((one.mask, one.pattern) for one in candidates):
        triggered = compose(images, mask, pattern).clamp(0, 1)
        goals = torch.full((len(images),), target, device=images.device)
        hits = reached(predict(model, triggered), goals)
        rates.append(float(hits.double().mean()))
        if rates[-1] >= floor:
            break
    best = len(rates) - 1 if rates[-1] >= floor else 0
    return InvertedTrigger(
        candidates[best].mask, candidates[best].pattern, target=target, success_rate=rates[best]
    )


def check_inputs(
    model: nn.Module, images: Tensor, labels: Tensor | None, targets: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...]]:
    """The images' labels, and the targets to search, all if None.

    Raises:
        ValueError: Bad images or labels, a target that the model does not have, or no image of
            another class than a target.
    """
    check_images(images)
    logits = predict(model, images[:1] if labels is not None else images)
    count = logits.shape[1]
    targets = tuple(range(count)) if targets is None else tuple(targets)
    for target in targets:
        if not isinstance(target, int) or not 0 <= target < count:
            raise ValueError(f"expected a target in 0 .. {count - 1}, got {target}")
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"expected at least one target, each once, got {targets}")
    labels = logits.argmax(1) if labels is None else labels
    check_labels(labels, len(images), num_classes=count)
    labels = labels.to(images.device)
    for target in targets:
        if not bool((labels != target).any()):
            raise ValueError(f"expected images of other classes than {target}, found none")
    return labels, targets
