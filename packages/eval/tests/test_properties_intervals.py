"""Intervals, rates and records: what holds for any counts and any content."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wm_eval.intervals import exact_interval, exact_lower, exact_upper, paired_difference, wilson
from wm_eval.records import Record, add_record, canonical_json, compact, read_study
from wm_eval.robustness import Outcomes, compare, summarize

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=60)
levels = st.floats(0.5, 0.999)


@st.composite
def counts(draw: st.DrawFn, *, most: int = 500) -> tuple[int, int]:
    """(successes, n)."""
    n = draw(st.integers(1, most))
    return draw(st.integers(0, n)), n


@STEADY
@given(counts(), levels)
def test_an_interval_holds_the_rate_and_mirrors(count: tuple[int, int], level: float) -> None:
    successes, n = count
    for interval in (wilson, exact_interval):
        found = interval(successes, n, level=level)
        assert 0 <= found.low <= successes / n <= found.high <= 1
        assert found.low < found.high
        mirror = interval(n - successes, n, level=level)
        assert (mirror.low, mirror.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


@STEADY
@given(counts(most=100), st.integers(2, 10), levels)
def test_more_images_make_it_narrower_and_more_confidence_wider(
    count: tuple[int, int], times: int, level: float
) -> None:
    successes, n = count
    for interval in (wilson, exact_interval):
        once = interval(successes, n, level=level)
        often = interval(successes * times, n * times, level=level)
        surer = interval(successes, n, level=(1 + level) / 2)
        assert often.high - often.low < once.high - once.low
        assert surer.low <= once.low and once.high <= surer.high


@STEADY
@given(counts(), levels)
def test_wilsons_ends_solve_his_equation(count: tuple[int, int], level: float) -> None:
    """At an end, the rate seen lies z standard errors (those of the end) away."""
    successes, n = count
    found = wilson(successes, n, level=level)
    errors = []
    for end in (found.low, found.high):
        if 0 < end < 1:
            errors.append(abs(successes / n - end) / math.sqrt(end * (1 - end) / n))
    for error in errors:
        assert math.erf(error / math.sqrt(2)) == pytest.approx(level, abs=1e-6)
    assert errors


@STEADY
@given(counts(most=200), levels)
def test_one_sided_bounds_are_the_ends_of_a_wider_two_sided_interval(
    count: tuple[int, int], level: float
) -> None:
    successes, n = count
    upper, lower = (bound(successes, n, level=level) for bound in (exact_upper, exact_lower))
    assert 0 <= lower <= successes / n <= upper <= 1
    if level > 0.5:
        both = exact_interval(successes, n, level=2 * level - 1)
        assert (lower, upper) == pytest.approx((both.low, both.high), abs=1e-9)


pairs = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))


@STEADY
@given(pairs, levels)
def test_a_paired_difference_is_what_two_columns_say(
    pair: tuple[int, int, int], level: float
) -> None:
    first_only, second_only, alike = pair
    n = first_only + second_only + alike
    assume(n > 0)
    found = paired_difference(first_only, second_only, n, level=level)
    assert found.value == (first_only - second_only) / n
    assert (found.only_first, found.only_second, found.n) == (first_only, second_only, n)
    assert -1 <= found.low < found.high <= 1
    first = torch.tensor([True] * first_only + [False] * second_only + [True] * alike)
    second = torch.tensor([False] * first_only + [True] * second_only + [True] * alike)
    assert compare(first, second) == paired_difference(first_only, second_only, n)


rows = st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=60)


@STEADY
@given(rows)
def test_rates_are_what_a_loop_counts(drawn: list[tuple[bool, bool, bool, bool]]) -> None:
    columns = Outcomes(*(torch.tensor(column) for column in zip(*drawn, strict=True)))
    counted = [row for row in drawn if row[1]]
    if not counted:
        with pytest.raises(ValueError, match="another class than the target, got none"):
            summarize(columns)
        return
    found = summarize(columns)
    assert (found.n_clean, found.n_attack) == (len(drawn), len(counted))
    assert found.cda == sum(row[0] for row in drawn) / len(drawn)
    assert found.asr == sum(row[2] for row in counted) / len(counted)
    assert found.ftr == sum(row[3] for row in counted) / len(counted)
    for rate, interval in (
        (found.cda, found.cda_interval),
        (found.asr, found.asr_interval),
        (found.ftr, found.ftr_interval),
    ):
        assert 0 <= interval.low <= rate <= interval.high <= 1


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
plain = st.none() | st.booleans() | numbers | st.text()
content = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@pytest.mark.integration
@settings(parent=STEADY, max_examples=25)
@given(st.dictionaries(st.text(), content, max_size=4), st.integers(0, 2**32))
def test_a_record_comes_back_with_the_same_bytes(values: dict[str, object], seed: int) -> None:
    record = Record("drawn", {"seed": seed}, {"ratio": 0.1}, {}, "data", values)
    with TemporaryDirectory() as name:
        folder = Path(name)
        add_record(folder, record, {}, 1.0)
        once = (folder / "records.jsonl").read_bytes()
        (back,) = read_study(folder).records
        compact(folder)
        assert (folder / "records.jsonl").read_bytes() == once == back.line.encode()
    assert back.id == record.id
    assert canonical_json(back.values) == canonical_json(values)
    assert json.loads(canonical_json(values)).keys() == values.keys()


def test_the_level_is_95_per_cent_unless_another_is_asked_for() -> None:
    for interval in (wilson, exact_interval, exact_upper, exact_lower):
        assert interval(3, 10) == interval(3, 10, level=0.95)
        assert interval(3, 10) != interval(3, 10, level=0.94)
    assert paired_difference(3, 1, 10) == paired_difference(3, 1, 10, level=0.95)


def test_a_difference_of_few_images_ends_at_one() -> None:
    assert paired_difference(1, 0, 1).high == 1
    assert paired_difference(0, 1, 1).low == -1


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5])
def test_a_level_at_the_end_of_its_range_is_refused(level: float) -> None:
    for interval in (wilson, exact_interval, exact_upper, exact_lower):
        with pytest.raises(ValueError, match=r"expected a level in \(0, 1\)"):
            interval(3, 10, level=level)
