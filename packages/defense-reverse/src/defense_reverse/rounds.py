"""What both engines share: the batches, the loss, what a round measures, and a label's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_reverse.config import ReverseConfig
from defense_reverse.search import LambdaSearch
from wm_inject import Lpips
from wm_inject.core.images import quantize
from wm_victim.inference import resolve_precision

Generate = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> the same
Loss = Callable[[Tensor, Tensor], Tensor]  # generated, images (N, C, H, W) -> (N,)


class Found(NamedTuple):
    """A generator, as a vector of its weights, and what it does to the defender's images."""

    success_rate: float
    residual: float  # equation 5, or its root mean square: see ReverseConfig.score
    weights: Tensor  # (P,)


class LabelRecord:
    """One label's state of affairs: its weight lambda_1, its best generators, whether it is done.

    Pure book-keeping: one call per round with what the round measured, so it is tested with
    scripts.

    Args:
        config: Settings.
        start: What the start does; it counts as found.
    """

    def __init__(self, config: ReverseConfig, start: Found) -> None:
        self._floor, self._keep = config.success_floor, config.fallbacks
        self._patience, self._stale = config.patience, 0
        self.search = LambdaSearch(config.lambdas[0], growth=config.growth, shrink=config.shrink)
        self.found: list[Found] = [start]  # the best first

    def __repr__(self) -> str:
        return f"LabelRecord(score={self.score:.4g}, finished={self.finished})"

    @property
    def score(self) -> float:
        """The smallest residual at the success floor so far; infinite before the floor is met."""
        best = self.found[0]
        return best.residual if best.success_rate >= self._floor else float("inf")

    @property
    def finished(self) -> bool:
        """Whether the floor was met, and then no smaller residual for ``patience`` rounds."""
        return 0 < self._patience <= self._stale and self.score < float("inf")

    def take(self, now: Found) -> None:
        """Take in one round: ask the search for the next weight, and keep the generator if good."""
        reached = now.success_rate >= self._floor
        before = self.score
        ranked = sorted([*self.found, now], key=self._rank)
        self.found = ranked[: self._keep]
        self._stale = 0 if self.score < before or before == float("inf") else self._stale + 1
        self.search.update(success=reached)

    def settle(self, measure: Callable[[Tensor], tuple[float, float]]) -> Found:
        """The best generator that reaches the floor on all images, else the one that comes nearest.

        Args:
            measure: Success rate and residual of a generator on all images.
        """
        measured: list[Found] = []
        for found in self.found:
            measured.append(Found(*measure(found.weights), found.weights))
            if measured[-1].success_rate >= self._floor:
                return measured[-1]
        return max(measured, key=lambda found: found.success_rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "search": self.search.state(),
            "stale": self._stale,
            "found": [tuple(found) for found in self.found],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.search.restore(state["search"])
        self._stale = state["stale"]
        self.found = [Found(*found) for found in state["found"]]

    def _rank(self, found: Found) -> tuple[bool, float]:
        """The smaller residual among those above the floor; below it, the higher success rate."""
        reached = found.success_rate >= self._floor
        return (False, found.residual) if reached else (True, -found.success_rate)


class Batches:
    """Index batches without end: every image once before any image again.

    Args:
        indices: int64 ``(N,)``, the images to draw from.
        size: Images per batch, at most N.
        seed: Seeds the order.
    """

    def __init__(self, indices: Tensor, size: int, seed: int) -> None:
        self._indices, self._size = indices, min(size, len(indices))
        self._generator = torch.Generator().manual_seed(seed)
        self._rest = torch.empty(0, dtype=torch.int64)

    def draw(self) -> Tensor:
        """The next batch of indices."""
        while len(self._rest) < self._size:
            order = torch.randperm(len(self._indices), generator=self._generator)
            self._rest = torch.cat([self._rest, order])
        taken, self._rest = self._rest[: self._size], self._rest[self._size :]
        return self._indices[taken]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {"generator": self._generator.get_state(), "rest": self._rest.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._generator.set_state(state["generator"])
        self._rest = state["rest"]


def round_subset(indices: Tensor, count: int, seed: int) -> Tensor:
    """The images that rounds measure by: ``count`` drawn ones, or all where count is 0."""
    if count == 0 or count >= len(indices):
        return indices
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return indices[order[:count].sort().values]


def measure(
    generate: Generate, model: nn.Module, images: Tensor, target: int, *, score: str = "l1"
) -> tuple[float, float]:
    """Success rate, and the mean size of the change (equation 5 for "l1"), on 8-bit images."""
    hits, change = 0, 0.0
    size = torch.Tensor.abs if score == "l1" else torch.Tensor.square
    with torch.no_grad():
        for part in images.split(256):
            generated = quantize(generate(part).float())
            hits += int((model(generated).argmax(1) == target).sum())
            each = size(generated - part).mean(dim=(1, 2, 3)).double()
            change += float((each if score == "l1" else each.sqrt()).sum())
    return hits / len(images), change / len(images)


def reconstruction(config: ReverseConfig, device: torch.device) -> Loss:
    """Equation 3 per image: lambda_2 MSE + lambda_3 LPIPS."""
    _, mse, perceptual = config.lambdas

    def squares(generated: Tensor, images: Tensor) -> Tensor:
        return mse * F.mse_loss(generated, images, reduction="none").mean(dim=(1, 2, 3))

    if perceptual == 0:
        return squares
    lpips = Lpips().to(device)
    return lambda generated, images: (
        squares(generated, images) + perceptual * lpips(generated, images)
    )


def autocast(config: ReverseConfig, device: torch.device) -> torch.autocast:
    """The precision that training runs in."""
    low = resolve_precision(config.precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
