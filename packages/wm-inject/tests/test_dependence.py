"""How alike changes are: known values, and an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wm_inject.stealth import image_dependence


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_one_pattern_is_universal_and_independent_changes_are_not() -> None:
    same = image_dependence(noise(1).expand(20, 3, 8, 8))
    assert same[:3] == pytest.approx((1, 1, 1))
    assert same.images == 20
    apart = image_dependence(noise(400))
    # The mean over N (N - 1) / 2 nearly independent cosines in 192 dimensions.
    bound = 5 * (2 / (400 * 399) / 192) ** 0.5
    assert abs(apart.universal) < bound and abs(apart.cosine) < bound
    assert 8 / 192 < apart.leading < 0.15
    opposite = image_dependence(torch.cat([noise(1), -noise(1)]))
    assert opposite.universal == pytest.approx(-1) and opposite.cosine == pytest.approx(-1)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("count", [3, 300])
def test_a_known_mixture_has_its_share_whatever_the_number(share: float, count: int) -> None:
    pattern = noise(1) / noise(1).norm()
    measured = []
    for seed in range(30):
        own = noise(count, seed + 1)
        own = own / own.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        changes = share**0.5 * pattern + (1 - share) ** 0.5 * own
        measured.append(image_dependence(changes).universal)
    error = np.std(measured) / len(measured) ** 0.5
    assert np.mean(measured) == pytest.approx(share, abs=4 * error + 1e-3)


def test_it_agrees_with_numpy() -> None:
    changes = noise(12, 3) + noise(1, 4)
    rows = changes.flatten(1).double().numpy()
    found = image_dependence(changes)
    pairs = [
        rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert found.cosine == pytest.approx(np.mean(pairs))
    values = np.linalg.svd(rows, compute_uv=False) ** 2
    assert found.leading == pytest.approx(values[:8].sum() / values.sum())


def test_what_is_refused() -> None:
    for bad in (noise(1), noise(3)[0], torch.zeros(3, 1, 4, 4), noise(2) * float("nan")):
        with pytest.raises(ValueError, match="expected"):
            image_dependence(bad)
