"""What the order, the unit and the zero of the scores may not change, and what more of it may."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from defense_nc import mad_index, outlier_test

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=60)
# Thousandths, so that moving and scaling them rounds nothing that matters.
values = st.integers(1, 100_000).map(lambda thousandths: thousandths / 1000)


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """float64 (K,), K from 3 to 15, positive; not all alike."""
    drawn = draw(st.lists(values, min_size=3, max_size=15))
    assume(len(set(drawn)) > 2)
    return torch.tensor(drawn, dtype=torch.float64)


sides = st.sampled_from(("lower", "upper"))
medians = st.sampled_from(("mid", "low"))


def definition(
    numbers: list[float], side: str, median: str, c: float
) -> tuple[list[float], float, float]:
    """The index of each, the median and the deviation, in plain Python."""

    def middle(of: list[float]) -> float:
        ordered, half = sorted(of), (len(of) - 1) // 2
        if median == "low" or len(of) % 2:
            return ordered[half]
        return (ordered[half] + ordered[half + 1]) / 2

    centre = middle(numbers)
    mad = c * middle([abs(number - centre) for number in numbers])
    signed = [(centre - n if side == "lower" else n - centre) for n in numbers]
    return [0.0 if s <= 0 else (s / mad if mad else math.inf) for s in signed], centre, mad


@STEADY
@given(scores(), sides, medians, st.floats(0.5, 3))
def test_the_index_is_its_definition(found: Tensor, side: str, median: str, c: float) -> None:
    index = mad_index(found, side=side, median=median, c=c)
    each, centre, mad = definition(found.tolist(), side, median, c)
    assert index.per_label.tolist() == pytest.approx(each, rel=1e-9, abs=1e-9)
    assert (index.median, index.mad) == pytest.approx((centre, mad))
    assert index.index == pytest.approx(max(each))
    assert index.per_label[index.label] == index.per_label.max()
    assert index.flagged == tuple(k for k, i in enumerate(index.per_label.tolist()) if i > 2)


@STEADY
@given(scores(), st.data())
def test_the_order_of_the_labels_does_not_matter(found: Tensor, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(found)))))
    straight, mixed = mad_index(found), mad_index(found[order])
    torch.testing.assert_close(mixed.per_label, straight.per_label[order])
    before, after = outlier_test(found), outlier_test(found[order])
    torch.testing.assert_close(after.p_values, before.p_values[order])
    back = {int(old): new for new, old in enumerate(order)}
    assert set(mixed.flagged) == {back[k] for k in straight.flagged}
    assert set(after.suspected) == {back[k] for k in before.suspected}


@STEADY
@given(
    scores(), st.sampled_from((0.001, 0.25, 3.0, 4096.0)), st.floats(-1000, 1000), sides, medians
)
def test_the_index_knows_neither_unit_nor_zero(
    found: Tensor, scale: float, shift: float, side: str, median: str
) -> None:
    plain = mad_index(found, side=side, median=median)
    assume(plain.mad > 1e-6)
    moved = mad_index(found * scale + shift * scale, side=side, median=median)
    torch.testing.assert_close(moved.per_label, plain.per_label, rtol=1e-6, atol=1e-6)


@STEADY
@given(scores(), medians)
def test_turning_the_scores_round_turns_the_side(found: Tensor, median: str) -> None:
    assume(median == "mid" or len(found) % 2 == 1)
    lower, upper = mad_index(found, median=median), mad_index(-found, side="upper", median=median)
    torch.testing.assert_close(upper.per_label, lower.per_label)
    # No label lies on both sides of the median.
    other = mad_index(found, side="upper", median=median)
    assert not bool(((lower.per_label > 0) & (other.per_label > 0)).any())


@STEADY
@given(scores(), st.sampled_from((0.001, 3.0, 4096.0)))
def test_the_test_knows_no_unit(found: Tensor, scale: float) -> None:
    plain, scaled = outlier_test(found), outlier_test(found * scale)
    torch.testing.assert_close(scaled.p_values, plain.p_values, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scaled.ratio, plain.ratio)
    assert bool((plain.p_values > 0).all()) and bool((plain.p_values <= 1).all())


@STEADY
@given(scores(), st.floats(0.05, 0.95), st.integers(0, 14))
def test_a_lower_score_is_never_less_suspect(found: Tensor, share: float, label: int) -> None:
    label %= len(found)
    lowered = found.clone()
    lowered[label] *= share
    before, after = outlier_test(found), outlier_test(lowered)
    assert float(after.p_values[label]) <= float(before.p_values[label]) + 1e-12


@STEADY
@given(scores(), st.floats(0.01, 0.99), st.floats(0.01, 1))
def test_suspected_is_significant_and_far_below(
    found: Tensor, alpha: float, max_ratio: float
) -> None:
    test = outlier_test(found, alpha=alpha, max_ratio=max_ratio)
    both = zip(test.p_values.tolist(), test.ratio.tolist(), strict=True)
    expected = [k for k, (p, ratio) in enumerate(both) if p <= alpha and ratio <= max_ratio]
    assert list(test.suspected) == expected
    middle = definition(found.tolist(), "lower", "mid", 1)[1]
    assert test.ratio.tolist() == pytest.approx([n / middle for n in found.tolist()])


def test_an_index_of_exactly_two_is_not_above_two() -> None:
    found = mad_index(torch.tensor([3.0, 4, 5, 6, 7]), c=1)
    assert found.index == 2 and found.flagged == ()
    assert mad_index(torch.tensor([3.0, 4, 5, 6, 7]), c=0.999).flagged == (0,)


def test_what_was_found_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        mad_index(torch.tensor([3.0, 4, 5])).index = 0  # type: ignore[misc]


def test_alpha_and_the_largest_ratio_are_themselves_allowed() -> None:
    found = torch.tensor([101.0, 103, 104, 106, 108, 110, 112, 117, 25], dtype=torch.float64)
    plain = outlier_test(found)
    alpha, ratio = float(plain.p_values[8]), float(plain.ratio[8])
    assert outlier_test(found, alpha=alpha, max_ratio=ratio).suspected == (8,)
    assert outlier_test(found, alpha=alpha * 0.999, max_ratio=ratio).suspected == ()
    assert outlier_test(found, alpha=alpha, max_ratio=ratio * 0.999).suspected == ()
    assert outlier_test(found, max_ratio=1.0).suspected == (8,)


def test_a_median_of_zero_says_nothing_and_a_median_of_one_is_a_score_like_any_other() -> None:
    nothing = outlier_test(torch.tensor([0.0, 0, 0, 5]))
    assert nothing.p_values.tolist() == nothing.ratio.tolist() == [1, 1, 1, 1]
    one = torch.tensor([0.1, 0.98, 1, 1.02, 1.05], dtype=torch.float64)
    assert outlier_test(one).suspected == outlier_test(one * 7).suspected == (0,)
