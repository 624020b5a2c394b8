"""Batches of row numbers, in random order, every row once before any row again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class EndlessBatches:
    """Batches of exactly ``size`` rows without end; a batch may span two passes.

    Its state can be stored, so that a stopped run continues with the same batches.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self._count, self._size, self._generator = count, size, generator
        self._rest = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        while len(self._rest) < self._size:
            order = torch.randperm(self._count, generator=self._generator)
            self._rest = torch.cat([self._rest, order])
        batch, self._rest = self._rest[: self._size], self._rest[self._size :]
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state and the rows left of the current pass."""
        return {"generator": self._generator.get_state(), "rest": self._rest.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._generator.set_state(state["generator"])
        self._rest = state["rest"]


def training_batches(
    count: int, size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Exactly ``steps`` batches, pass by pass.

    The last batch of a pass may be short, but never a single row, which batch normalisation cannot
    train on: that one is left for later passes.

    Raises:
        ValueError: Fewer than 2 rows, a size below 2, or steps below 0.
    """
    if count < 2 or size < 2 or steps < 0:
        raise ValueError(
            f"expected count >= 2, size >= 2 and steps >= 0, got {count}, {size}, {steps}"
        )
    return _passes(count, size, steps, generator)


def _passes(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    left = steps
    while left > 0:
        parts = torch.randperm(count, generator=generator).split(size)
        if len(parts[-1]) == 1:
            parts = parts[:-1]
        yield from parts[:left]
        left -= len(parts)
