"""Logits of classifiers that give something else: probabilities, or numbers squashed or scaled."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

_SUM = 1e-3  # how far the sums of rows of probabilities may lie apart
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 100.0), (0.0, 255.0))  # sigmoid, tanh, per cent, 8 bits
_NEAR = 0.1  # share of a range; squashed outputs come this near to both of its ends
_BEYOND = 0.01  # and at most this far beyond
_TINY = 1e-12
_BELOW_ONE = 2.0**-25  # half of the distance of 1 to the next smaller number


class Squash(NamedTuple):
    """What squashed a classifier's logits: into a range each, or, without one, to probabilities."""

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """In words."""
        return "probabilities" if self.low is None else f"a range of {self.low:g} to {self.high:g}"


class Logits(nn.Module):
    """A classifier's outputs as logits; the order of the classes stays as it is.

    Args:
        model: Images to outputs ``(N, K)``.
        squash: What made the outputs of logits; its inverse is taken.
        factor: What the logits are multiplied by, > 0.
        copy: The model changes its images in place: it gets copies.
    """

    def __init__(
        self,
        model: nn.Module,
        squash: Squash | None = None,
        *,
        factor: float = 1.0,
        copy: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.squash, self.factor, self.copy = model, squash, factor, copy

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        outputs: Tensor = self.model(images.clone() if self.copy else images)
        return self.convert(outputs)

    def convert(self, outputs: Tensor) -> Tensor:
        """The model's outputs as logits."""
        y = outputs
        if self.squash is not None:
            low, high = self.squash
            y = y.float()
            if low is None or high is None:
                y = y.clamp_min(_TINY).log()
            else:
                share = (y - low) / (high - low)
                y = share.clamp_min(_TINY).log() - (1 - share).clamp_min(_BELOW_ONE).log()
        return y if self.factor == 1 else y * self.factor


def squash_of(outputs: Tensor) -> Squash | None:
    """What squashed outputs ``(N, K)``, as far as their range tells; None for logits."""
    least, most, total = (float(x) for x in (outputs.min(), outputs.max(), outputs.sum(1).mean()))
    if least >= 0 and total > 0 and are_probabilities(outputs / total):
        return Squash()
    middle = float(outputs.amax(1).median())
    for low, high in _RANGES:
        near, beyond = _NEAR * (high - low), _BEYOND * (high - low)
        inside = low - beyond <= least <= low + near and most <= high + beyond
        if inside and middle >= high - near:
            return Squash(min(low, least), max(high, most))
    return None


def are_probabilities(outputs: Tensor) -> bool:
    """Whether rows ``(N, K)`` are >= 0 and all add up to 1."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < _SUM).all())
