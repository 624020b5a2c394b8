"""Muon (Jordan 2024): momentum, orthogonalised, for the filters of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.6  # Nesterov's, as in airbench94
_ROUNDS = 3  # of the Newton-Schulz iteration
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix ``(R, C)`` with its singular vectors, and singular values near 1.

    A Newton-Schulz iteration of the fifth order in the matrix's own precision; small singular
    values stay below 1.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised steps for weights ``(C', C, H, W)``, which are kept at norm sqrt(C').

    Args:
        params: Groups of weights of convolutions.
        lr: A step's length in units of an orthogonal matrix.
        dtype: Of the iteration's matrix products.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; weights without a gradient stay. ``closure`` must be None."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"])

    def _move(self, weight: Tensor, grad: Tensor, lr: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(grad)
        slope = grad.add(momentum, alpha=MOMENTUM)
        update = orthogonalize(slope.flatten(1).to(self._dtype)).to(weight.dtype)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_(update.view(weight.shape), alpha=lr)
