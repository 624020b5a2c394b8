"""Averaging takes away what all marks share, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wm_extract import attack_by_averaging
from wm_inject import quantize


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def images(seed: int, count: int = 200) -> Tensor:
    return quantize((0.5 + 0.05 * noise(count, seed)).clamp(0.2, 0.8))


class Along:
    """Calls marked what lies along a direction, one for all images or one for each."""

    def __init__(self, originals: Tensor, direction: Tensor) -> None:
        self.originals, self.direction = originals, direction

    def detect(self, changed: Tensor) -> Any:
        along = ((changed - self.originals) * self.direction).sum((1, 2, 3))
        return SimpleNamespace(marked=along > 0.5 * 0.04 * self.direction.square().sum((1, 2, 3)))


@pytest.mark.parametrize("paired", [True, False])
def test_one_pattern_is_removed_and_forged(paired: bool) -> None:
    pattern, clean, seen = noise(1, 0), images(1), images(2)
    mark = 0.04 * pattern
    detector: Any = Along(clean, pattern)
    first, last = attack_by_averaging(
        detector,
        quantize(clean + mark),
        clean,
        seen_marked=quantize(seen + mark),
        seen_clean=seen if paired else images(3),
        counts=(1, 200),
    )
    assert (last.known, last.found, last.forged) == (200, 0, 1)
    if paired:
        assert first.found == 0 and first.forged == 1


def test_a_mark_of_each_images_own_stays() -> None:
    clean, seen, directions = images(1), images(2), noise(200, 4)
    detector: Any = Along(clean, directions)
    (row,) = attack_by_averaging(
        detector,
        quantize(clean + 0.04 * directions),
        clean,
        seen_marked=quantize(seen + 0.04 * noise(200, 5)),
        seen_clean=seen,
        counts=(200,),
    )
    assert row.found == 1 and row.forged == 0


def test_what_is_refused() -> None:
    some: dict[str, Any] = {"seen_marked": images(1), "seen_clean": images(2)}
    detector: Any = Along(images(3), noise(1, 0))
    for counts in ((), (0,), (201,)):
        with pytest.raises(ValueError, match=r"counts in 1 \.\. 200"):
            attack_by_averaging(detector, images(3), images(3), counts=counts, **some)
    with pytest.raises(ValueError, match="clean of the marked images' shape"):
        attack_by_averaging(detector, images(3), images(3)[..., :4], counts=(1,), **some)
