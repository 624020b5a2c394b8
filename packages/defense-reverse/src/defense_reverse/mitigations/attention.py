"""Attention maps: where a layer is active, and how far two networks differ in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-6  # the released code's, against maps of zeros


def attention_map(maps: Tensor, *, power: float = 2.0) -> Tensor:
    """Where a layer is active: ``sum over c of |maps|^power``, with an L2 norm of 1 per image.

    Args:
        maps: float ``(N, C, H, W)``, more than one pixel.
        power: p, above 0.

    Returns:
        ``(N, H, W)``; all zeros where the maps are.

    Raises:
        ValueError: Not such maps. At a single pixel the attention is 1 whatever happens, and its
            loss teaches nothing.
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim != 4:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"expected float maps of shape (N, C, H, W), got {got}")
    if maps.shape[2] * maps.shape[3] < 2:
        raise ValueError(
            f"expected maps of more than one pixel for attention, got {tuple(maps.shape)}"
        )
    if not power > 0:
        raise ValueError(f"expected a power above 0, got {power}")
    attention = maps.abs().pow(power).sum(1)
    norm = torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True)
    return attention / (norm + _EPSILON)


def attention_loss(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """The mean squared difference of two layers' attention maps.

    Args:
        student: float ``(N, C, H, W)``.
        teacher: The same N, H and W.
        power: p of the maps.

    Returns:
        A scalar.

    Raises:
        ValueError: Not such maps.
    """
    ours, theirs = (attention_map(maps, power=power) for maps in (student, teacher))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"expected two attention maps of one shape, got {tuple(ours.shape)} "
            f"and {tuple(theirs.shape)}"
        )
    return F.mse_loss(ours, theirs)
