"""What holds for any two residuals compared. Examples are drawn, the same ones each time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defense_reverse.closeness import compare_images
from wm_inject import quantize

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
counts, seeds, strengths = st.integers(1, 5), st.integers(0, 2**32), st.floats(0, 1, width=32)


def drawn(seed: int, count: int, strengths: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Two triggered versions of clean images (N, 3, 8, 8), and these, all on the 8-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    clean, one, other = torch.rand(3, count, 3, 8, 8, generator=generator)
    found, truth = (
        quantize((1 - share) * clean + share * mark)
        for share, mark in zip(strengths, (one, other), strict=True)
    )
    return found, truth, quantize(clean)


@STEADY
@given(seeds, counts, strengths, strengths)
def test_figures_lie_in_their_ranges_and_are_what_a_loop_counts(
    seed: int, count: int, one: float, other: float
) -> None:
    found, truth, clean = drawn(seed, count, (one, other))
    told = compare_images(found, truth, clean)
    assert -1 - 1e-9 <= told.cosine <= 1 + 1e-9
    assert -1 - 1e-9 <= told.cosine_shuffled <= 1 + 1e-9
    assert told.explained <= 1 and told.energy_true >= 0 and told.energy_reversed >= 0
    cosines, missed = [], 0.0
    for ours, theirs in zip((found - clean).double(), (truth - clean).double(), strict=True):
        a, b = ours.flatten().tolist(), theirs.flatten().tolist()
        length = math.hypot(*a) * math.hypot(*b)
        cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0)
        missed += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / clean.numel()
    assert told.cosine == pytest.approx(sum(cosines) / count, abs=1e-9)
    expected = 1 - missed / told.energy_true if told.energy_true else 0.0
    assert told.explained == pytest.approx(expected, rel=1e-6, abs=1e-6)


@STEADY
@given(seeds, counts, st.floats(0.125, 1, width=32))
def test_the_trigger_itself_is_as_close_as_can_be_and_a_copy_explains_nothing(
    seed: int, count: int, strength: float
) -> None:
    _, truth, clean = drawn(seed, count, (0.0, strength))
    itself, copy = (compare_images(images, truth, clean) for images in (truth, clean))
    assert itself.psnr == 100 and itself.explained == 1
    assert itself.cosine == pytest.approx(1)
    assert (copy.cosine, copy.explained, copy.energy_reversed) == (0, 0, 0)
    assert copy.psnr == copy.psnr_clean == itself.psnr_clean < itself.psnr


@STEADY
@given(seeds, counts, strengths, strengths)
def test_who_is_called_the_truth_does_not_change_likeness(
    seed: int, count: int, one: float, other: float
) -> None:
    found, truth, clean = drawn(seed, count, (one, other))
    there, back = compare_images(found, truth, clean), compare_images(truth, found, clean)
    assert there.cosine == pytest.approx(back.cosine, abs=1e-12)
    assert there.psnr == pytest.approx(back.psnr)
    assert there.energy_true == back.energy_reversed
