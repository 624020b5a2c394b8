"""What holds for any corruption and any map. Examples are drawn, the same ones each time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wm_extract import balanced_bit_accuracy, mark_score
from wm_extract.corruptions import (
    EXTRA_CORRUPTIONS,
    PAPER_CORRUPTIONS,
    RandomCorruption,
    named_corruption,
)

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
NAMES = (*PAPER_CORRUPTIONS, *EXTRA_CORRUPTIONS)
seeds = st.integers(0, 2**32)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
@settings(parent=STEADY, max_examples=12)
@given(
    st.integers(1, 4),
    st.sampled_from((1, 3)),
    st.integers(16, 40),
    st.integers(16, 40),
    st.sampled_from((0.0, 1.0, 20.0)),
    seeds,
)
def test_a_corruption_keeps_shape_and_range(
    name: str, count: int, channels: int, height: int, width: int, contrast: float, seed: int
) -> None:
    images = (drawn(seed, count, channels, height, width) * contrast).clamp(0, 1)
    before = images.clone()
    corrupt = named_corruption(name)
    out, again = (corrupt(images, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert out.shape == images.shape and out.dtype == torch.float32
    assert bool(out.isfinite().all()) and float(out.min()) >= 0 and float(out.max()) <= 1
    assert torch.equal(out, again) and torch.equal(images, before)


@STEADY
@given(st.floats(0, 1), seeds)
def test_an_operation_is_applied_to_images_or_leaves_them_alone(share: float, seed: int) -> None:
    images = drawn(seed, 6, 3, 16, 16)
    dark = RandomCorruption([lambda batch, *, generator: torch.zeros_like(batch)], share)
    out = dark(images, generator=torch.Generator().manual_seed(seed))
    blackened = (out == 0).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert bool((blackened | kept).all())
    if share in (0, 1):
        assert bool((blackened if share else kept).all())


@st.composite
def marks(draw: st.DrawFn) -> Tensor:
    """A watermark (1, S, S) with both ones and zeros."""
    side = draw(st.integers(2, 12))
    bits = draw(st.lists(st.booleans(), min_size=side * side - 2, max_size=side * side - 2))
    return torch.tensor([True, *bits, False]).float().view(1, side, side)


@STEADY
@given(marks(), seeds)
def test_balanced_bit_accuracy_is_what_a_loop_counts(mark: Tensor, seed: int) -> None:
    side = mark.shape[1]
    maps = drawn(seed, 3, 1, side, side)
    expected = []
    for one in maps:
        right: dict[bool, list[bool]] = {True: [], False: []}
        for found, wanted in zip(one.flatten().tolist(), mark.flatten().tolist(), strict=True):
            right[wanted == 1].append((found > 0.5) == (wanted == 1))
        expected.append(sum(sum(part) / len(part) for part in right.values()) / 2)
    found = balanced_bit_accuracy(maps, mark)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(balanced_bit_accuracy(1 - maps, mark), 1 - found)


@STEADY
@given(marks(), st.floats(0, 1, width=32))
def test_the_mark_scores_one_and_a_constant_map_one_half(mark: Tensor, level: float) -> None:
    flat = torch.full_like(mark, level)[None]
    assert float(balanced_bit_accuracy(mark[None], mark)) == 1
    assert float(balanced_bit_accuracy(1 - mark[None], mark)) == 0
    assert float(balanced_bit_accuracy(flat, mark)) == 0.5


@STEADY
@given(marks(), st.floats(0, 1), st.floats(0, 1), seeds)
def test_more_of_the_mark_is_a_higher_score(
    mark: Tensor, one: float, other: float, seed: int
) -> None:
    noise = drawn(seed, 1, *mark.shape)
    less, more = sorted((one, other))
    low, high = (mark_score((1 - share) * noise + share * mark, mark) for share in (less, more))
    assert float(low) <= float(high) + 1e-4
