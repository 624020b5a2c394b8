"""Generators of several labels as rows of one matrix, trained by one optimiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from defense_reverse.config import ReverseConfig
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import Generate, descend


class Moments(NamedTuple):
    """One label's weights and Adam's moments of them, each ``(P,)``."""

    weights: Tensor
    mean: Tensor
    square: Tensor


class _Unchecked(nn.Module):
    """A generator without the check of its input, which a loop makes once and vmap cannot make."""

    def __init__(self, generator: UNetGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        return self.generator.transform(images)


class GeneratorStack:
    """L generators of one shape as a matrix ``(L, P)`` with one generator a row.

    All parameters are views into the matrix, which is the one parameter of one Adam. Adam works
    number by number: each row comes out as with an optimiser of its own.

    Args:
        start: A generator of the same shape; not changed.
        rows: The labels' weights and moments.
        steps: Steps that Adam has taken before.
        config: ``lr`` and ``stack``.
    """

    def __init__(
        self, start: UNetGenerator, rows: Sequence[Moments], *, steps: int, config: ReverseConfig
    ) -> None:
        weights, mean, square = (torch.stack(part) for part in zip(*rows, strict=True))  # (L, P)
        suited = "vmapped" if weights.device.type == "cuda" else "apart"
        self._mode = suited if config.stack == "auto" else config.stack
        self._config = config
        self._net = _Unchecked(copy.deepcopy(start).requires_grad_(False))
        self._matrix = nn.Parameter(weights)
        self._adam = torch.optim.Adam([self._matrix], lr=config.lr, foreach=False)
        self._adam.state[self._matrix] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": mean,
            "exp_avg_sq": square,
        }

    def _run(self, weights: Tensor, images: Tensor) -> Tensor:
        # (P,), (B, C, H, W) -> (B, C, H, W). Under vmap over rows (L, P) and batches
        # (L, B, C, H, W), torch makes each convolution one grouped convolution, a group a label.
        parameters = unpack(self._net.generator, weights)
        named = {f"generator.{name}": value for name, value in parameters.items()}
        return functional_call(self._net, named, (images,))

    def generate(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Each label's generated images from each label's batch ``(B, C, H, W)``."""
        # Batches of unlike sizes, where a class fills most of the images, cannot be stacked.
        if self._mode == "vmapped" and len({len(batch) for batch in batches}) == 1:
            return list(torch.vmap(self._run)(self._matrix, torch.stack(list(batches))))
        rows = self._matrix.unbind()
        return [self._run(row, batch) for row, batch in zip(rows, batches, strict=True)]

    def generator(self, row: int) -> Generate:
        """One label's generator as a function of images."""
        weights = self._matrix.detach()[row]
        return lambda images: self._run(weights, images)

    def step(self, loss: Tensor) -> None:
        """One step of Adam on the sum of the labels' losses."""
        descend(self._adam, loss)

    def weights(self, row: int) -> Tensor:
        """A copy of one label's weights ``(P,)``."""
        return self._matrix.detach()[row].clone()

    def select(self, rows: Sequence[int]) -> GeneratorStack:
        """A new stack of some of the rows."""
        steps = int(self._adam.state[self._matrix]["step"])
        moments = [self.moments(row) for row in rows]
        return GeneratorStack(self._net.generator, moments, steps=steps, config=self._config)

    def moments(self, row: int) -> Moments:
        """A copy of all that another stack needs to continue with one label."""
        state = self._adam.state[self._matrix]
        mean, square = (state[key][row].clone() for key in ("exp_avg", "exp_avg_sq"))
        return Moments(self.weights(row), mean, square)


def initial_moments(start: UNetGenerator) -> Moments:
    """The row of a label that has taken no step."""
    weights = pack(start)
    return Moments(weights, torch.zeros_like(weights), torch.zeros_like(weights))


def pack(generator: UNetGenerator) -> Tensor:
    """All weights of a generator as one vector ``(P,)``, kernels with their channels last."""
    parts = (_channels_last(value.detach()).reshape(-1) for value in generator.parameters())
    return torch.cat(list(parts))


def unpack(generator: UNetGenerator, rows: Tensor) -> dict[str, Tensor]:
    """Views of the parameters in vectors of `pack`, one ``(P,)`` or a matrix ``(L, P)``."""
    shapes = {name: _channels_last(value).shape for name, value in generator.named_parameters()}
    # One split: its gradient is one concatenation, where slices would each fill a row of zeros.
    parts = rows.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    parameters: dict[str, Tensor] = {}
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        view = part.unflatten(-1, shape)  # (..., out, kH, kW, in) for kernels
        parameters[name] = view.movedim(-1, -3) if len(shape) == 4 else view
    return parameters


def with_weights(generator: UNetGenerator, weights: Tensor) -> UNetGenerator:
    """A generator of the same shape with the weights of a packed vector, ready for a file."""
    filled = UNetGenerator(**generator.config)
    filled.load_state_dict({k: v.contiguous() for k, v in unpack(filled, weights).items()})
    return filled.to(weights.device).eval()


def _channels_last(value: Tensor) -> Tensor:
    return value.movedim(-3, -1) if value.ndim == 4 else value
