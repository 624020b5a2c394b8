"""How much a trigger's change depends on the image: what all images share can be averaged out.

Whoever averages marked images and takes the average of clean ones off holds what the changes have
in common, and can take it from a marked image or add it to a clean one (Yang et al., "Can Simple
Averaging Defeat Modern Watermarks?", NeurIPS 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wm_inject.core.images import resized

DIRECTIONS = 8
COMPARED = 1000  # images suffice
_SIDE = 64  # pixels at which changes of images of any size are compared


class Dependence(NamedTuple):
    """What the changes to ``images`` images have in common."""

    universal: float  # share of their energy that is the same in all; about 0 if independent
    leading: float  # share that lies in `DIRECTIONS` directions, in (0, 1]
    cosine: float  # mean over pairs of images of the cosine between their changes
    images: int


def image_dependence(changes: Tensor) -> Dependence:
    """How alike the changes to several images are.

    The universal share is (N |m|^2 - e) / ((N - 1) e) with m the mean change and e the mean of
    their squared norms. Its expectation does not depend on N: 0 for independent changes of mean 0,
    1 for one and the same. The share of the leading directions does depend on N, and is at least
    that of as many random ones. Images that are not changed are left out of the cosine.

    Args:
        changes: float ``(N, C, H, W)``, changed minus original, N at least 2.

    Raises:
        ValueError: Fewer than two, another shape, or no change at all.
    """
    if not isinstance(changes, Tensor) or changes.ndim != 4 or len(changes) < 2:
        got = tuple(changes.shape) if isinstance(changes, Tensor) else type(changes).__name__
        raise ValueError(f"expected changes (N, C, H, W) of at least two images, got {got}")
    if not bool(torch.isfinite(changes).all()):
        raise ValueError("expected finite changes, got NaN or infinity")
    rows = changes.flatten(1).double()
    count, products = len(rows), rows @ rows.T
    energies = products.diagonal()
    energy = float(energies.mean())
    if energy == 0:
        raise ValueError("expected changed images, got none that differ from their originals")
    common = float(products.mean())  # of the mean change
    leading = torch.linalg.eigvalsh(products).flip(0)[:DIRECTIONS].clamp(min=0).sum()
    nonzero = energies > 0
    units = rows[nonzero] / energies[nonzero].sqrt().unsqueeze(1)
    n = len(units)
    cosine = (float(units.sum(0).square().sum()) - n) / max(n * (n - 1), 1)
    return Dependence(
        (count * common - energy) / ((count - 1) * energy),
        float(leading / energies.sum()),
        cosine if n > 1 else float("nan"),
        count,
    )


def comparable_changes(changed: Tensor, originals: Tensor) -> Tensor:
    """The changes of those images that changed, float ``(M, 3, 64, 64)``, M at most N.

    Args:
        changed: float ``(N, C, H, W)``, C 1 or 3.
        originals: The same shape.
    """
    changes = changed - originals
    nonzero = changes[changes.flatten(1).any(1)]
    return resized(nonzero, (_SIDE, _SIDE)).expand(-1, 3, -1, -1)
