"""The implicit hypergradient: how a loss at the optimum of another changes with the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    iterations: int,
) -> tuple[float, list[Tensor]]:
    """How the outer loss at the inner optimum changes with the parameters.

    The optimum is taken as the fixed point of ``delta - lr * d inner / d delta``, so its change
    with the parameters follows from the implicit function theorem, the inverse as a power series.

    Args:
        inner: What ``delta`` minimises, as a function of ``delta``.
        outer: What the parameters are to minimise, likewise.
        delta: The inner optimum, or what is taken for it.
        parameters: What both losses depend on; they require gradients.
        lr: Step of the inner map, positive.
        iterations: Terms of the power series, at least 1; 1 leaves out the inner curvature.

    Returns:
        The outer loss, and one gradient for each parameter.

    Source: Zeng et al. 2022, equation 7, by fixed-point iteration as in the released code.
    """
    if not parameters or not lr > 0 or iterations < 1:
        raise ValueError(
            "expected parameters, lr > 0 and iterations >= 1, "
            f"got {len(parameters)}, {lr}, {iterations}"
        )
    parameters = list(parameters)
    delta = delta.detach().requires_grad_()
    loss = outer(delta)
    direct = torch.autograd.grad(loss, [delta, *parameters], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(delta), [delta], create_graph=True)
    mapped = delta - lr * slope
    change = direct[0]
    for _ in range(iterations - 1):
        (back,) = torch.autograd.grad(mapped, [delta], grad_outputs=change, retain_graph=True)
        change = back + direct[0]
    implicit = torch.autograd.grad(
        mapped, parameters, grad_outputs=change, allow_unused=True, materialize_grads=True
    )
    return float(loss.detach()), [a + b for a, b in zip(direct[1:], implicit, strict=True)]
