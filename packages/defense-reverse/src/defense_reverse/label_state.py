"""The state of one label's search: its batches, its weight lambda_1, its best generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.batches import EndlessBatches
from defense_nc.gradients import GradientCount, count_images, reached
from defense_reverse.config import ReverseConfig
from wm_inject import Lpips
from wm_inject.core.images import quantize
from wm_inject.core.precision import resolve_precision

Generate = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> the same
Loss = Callable[[Tensor, Tensor], Tensor]  # generated, images (N, C, H, W) -> (N,)

_WATCHED = 8  # images of every round whose gradients are looked at
_NARROW = 1.1  # a bracket narrower than this factor is not bisected further


class LambdaSearch:
    """The binary search for lambda_1: pure, one decision at a time.

    After a failure lambda_1 grows, after a success it shrinks; between the last failure and the
    last success it takes their geometric mean. The generator learns while the search goes on, so
    that an old failure says less and less: a bracket that has become narrow is opened again, by
    the smaller factor on both sides.

    Args:
        start: The first value.
        growth: Factor after a failure before any success.
        shrink: Divisor after a success with no failure below it; opens a narrow bracket too.

    Source: the paper searches lambda_1 by "a binary search ... to achieve a high attack success
        rate" and gives no more detail.
    """

    def __init__(self, start: float, *, growth: float = 2.0, shrink: float = 1.5) -> None:
        if not 0 <= start < float("inf"):
            raise ValueError(f"expected a first weight >= 0, got {start}")
        if not growth > 1 or not shrink > 1:
            raise ValueError(f"expected growth and shrink above 1, got {growth} and {shrink}")
        self.value = float(start)
        self._growth, self._shrink = growth, shrink
        self._failure: float | None = None
        self._success: float | None = None

    def __repr__(self) -> str:
        return f"LambdaSearch(value={self.value:.4g})"

    def state_dict(self) -> dict[str, float | None]:
        """All that changes."""
        return {"value": self.value, "failure": self._failure, "success": self._success}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from the state of another search."""
        assert state["value"] is not None
        self.value = state["value"]
        self._failure, self._success = state["failure"], state["success"]

    def update(self, *, success: bool) -> float:
        """The next value, after the present one did or did not reach the success floor."""
        if success:
            self._success = self.value
        else:
            self._failure = self.value
        low, high = self._failure, self._success
        if low is not None and high is not None and high > low * _NARROW:
            self.value = (low * high) ** 0.5
        elif success:
            self.value /= self._shrink
        else:
            self.value *= self._growth if high is None else self._shrink
        return self.value


class Candidate(NamedTuple):
    """A generator, as a vector of its weights, and what it does to the defender's images."""

    success_rate: float
    residual: float  # equation 5, or its root mean square: see ReverseConfig.score
    weights: Tensor  # (P,)


class LabelState:
    """One label's lambda_1 and best generators, updated once a round by what the round measured.

    Args:
        start: The generator that the search starts from, the first candidate.
    """

    def __init__(self, config: ReverseConfig, start: Candidate) -> None:
        self._floor, self._fallbacks = config.success_floor, config.fallbacks
        self._patience, self._stale = config.patience, 0
        self.search = LambdaSearch(config.lambdas[0], growth=config.growth, shrink=config.shrink)
        self.candidates: list[Candidate] = [start]  # the best first
        self.gradients = GradientCount()

    def __repr__(self) -> str:
        return f"LabelState(score={self.score:.4g}, finished={self.finished})"

    @property
    def score(self) -> float:
        """The smallest residual at the success floor so far; infinite before the floor is met."""
        best = self.candidates[0]
        return best.residual if best.success_rate >= self._floor else float("inf")

    @property
    def finished(self) -> bool:
        """Whether the floor was met, and then no smaller residual for ``patience`` rounds."""
        return 0 < self._patience <= self._stale and self.score < float("inf")

    def update(self, candidate: Candidate) -> None:
        """Take in one round: the next lambda_1, and the candidate if it is among the best."""
        before = self.score
        ranked = sorted([*self.candidates, candidate], key=self._rank)
        self.candidates = ranked[: self._fallbacks]
        self._stale = 0 if self.score < before or before == float("inf") else self._stale + 1
        self.search.update(success=candidate.success_rate >= self._floor)

    def best(self, measure: Callable[[Tensor], tuple[float, float]]) -> Candidate:
        """The best generator that reaches the floor when measured on all images, or the nearest."""
        measured: list[Candidate] = []
        for candidate in self.candidates:
            measured.append(Candidate(*measure(candidate.weights), candidate.weights))
            if measured[-1].success_rate >= self._floor:
                return measured[-1]
        return max(measured, key=lambda candidate: candidate.success_rate)

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "search": self.search.state_dict(),
            "stale": self._stale,
            "candidates": [tuple(candidate) for candidate in self.candidates],
            "gradients": self.gradients.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another label."""
        self.search.load_state_dict(state["search"])
        self._stale = state["stale"]
        self.gradients = GradientCount(*state["gradients"])
        device = self.candidates[0].weights.device
        self.candidates = [
            Candidate(rate, residual, weights.to(device))
            for rate, residual, weights in state["candidates"]
        ]

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        """The smaller residual among those above the floor; below it, the higher success rate."""
        reached = candidate.success_rate >= self._floor
        return (False, candidate.residual) if reached else (True, -candidate.success_rate)


def label_batches(indices: Tensor, config: ReverseConfig, seed: int) -> EndlessBatches:
    """The batches of one search, as rows of ``indices``."""
    size = min(config.batch_size, len(indices))
    return EndlessBatches(len(indices), size, torch.Generator().manual_seed(seed))


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
            logits = model(generated)
            goals = torch.full((len(part),), target, device=part.device)
            # In bfloat16, where searches run, ties are chance.
            hit = reached(logits, goals) if logits.dtype == torch.float32 else None
            hits += int((logits.argmax(1) == goals if hit is None else hit).sum())
            each = size(generated - part).mean(dim=(1, 2, 3)).double()
            change += float((each if score == "l1" else each.sqrt()).sum())
    return hits / len(images), change / len(images)


def count_gradients(
    generate: Generate, model: nn.Module, images: Tensor, target: int
) -> tuple[int, int]:
    """As `count_images`, of what a generator makes of the first of the images."""
    with torch.no_grad():
        generated = generate(images[:_WATCHED])
    return count_images(model, generated, target)


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


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        for value in group["params"]:
            if value.grad is not None:
                value.grad.nan_to_num_(0, 0, 0)  # what has no finite gradient stays where it is
    optimizer.step()


def autocast(config: ReverseConfig, device: torch.device) -> torch.autocast:
    """The precision that training runs in."""
    low = resolve_precision(config.precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
