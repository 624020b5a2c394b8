from __future__ import annotations

import math

import pytest

from defense_reverse import ReverseConfig
from defense_reverse.engines.stopping_rules import generator_halving


def halving_of(**changes):
    return generator_halving(ReverseConfig(**changes))


TEN = {label: float(label + 1) for label in range(10)}  # the label's score is its rank + 1


def test_the_lowest_and_those_around_the_median_go_on():
    halving = halving_of(candidates=3, references=2)
    # ranks 0, 1, 2 and 4, 5 have to stay; of the other five, two in five of ten leave
    assert halving.stop(20, TEN) == (6, 7, 8, 9)
    assert halving.stop(40, TEN) == (3,)
    assert halving.stop(60, TEN) == ()  # nobody is left who may leave
    assert halving.stopped_at == {**dict.fromkeys((6, 7, 8, 9), 20), 3: 40}


def test_a_large_field_shrinks_from_above_to_the_few_that_must_stay():
    halving = halving_of(candidates=3, references=2)
    scores = {label: 100.0 + label for label in range(40)}
    assert halving.stop(1, scores) == tuple(range(24, 40))
    for step in range(2, 9):
        halving.stop(step, scores)
    # 19 and 20 stand beside the median of all forty
    assert set(scores) - set(halving.stopped_at) == {0, 1, 2, 19, 20}


def test_labels_that_left_are_compared_at_equal_effort():
    halving = halving_of(candidates=2, references=1)
    left = halving.stop(20, TEN)
    # All that go on halve their scores afterwards, and the first becomes an outlier.
    final = {label: score if label in left else score / 2 for label, score in TEN.items()}
    final[0] = 0.01
    fair = halving.compare(final)
    assert all(fair[label] == pytest.approx(TEN[label] / 2) for label in range(1, 10))
    assert fair[0] == 0.01


def test_scores_that_rose_do_not_raise_those_that_left():
    halving = halving_of(candidates=2, references=1)
    left = halving.stop(20, TEN)
    worse = {label: score if label in left else score * 3 for label, score in TEN.items()}
    assert all(halving.compare(worse)[label] == TEN[label] for label in left)


def test_a_label_without_a_score_stays_whatever_the_others_do():
    halving = halving_of(candidates=1, references=1)
    late = {**TEN, 9: math.inf, 8: math.inf}
    for step in range(1, 6):
        halving.stop(step, late)
    assert {8, 9} <= set(late) - set(halving.stopped_at)
    # it comes out far below when it is reached at last
    final = {**late, 9: 0.1, 8: 5.0}
    assert halving.compare(final)[9] == 0.1


def test_a_target_that_overtakes_later_is_not_lost_while_it_is_a_candidate():
    halving = halving_of(candidates=3, references=2)
    early = {**TEN, 0: 2.9}  # third lowest at first
    halving.stop(20, early)
    assert 0 not in halving.stopped_at


def test_a_small_field_stays_whole(subtests):
    for count in [1, 2, 3, 5]:
        with subtests.test(count=count):
            assert halving_of().stop(1, {label: 1.0 + label for label in range(count)}) == ()


def test_nobody_leaves_while_nobody_has_a_score():
    halving = halving_of()
    assert halving.stop(1, dict.fromkeys(range(30), math.inf)) == ()
    assert halving.compare({0: math.inf}) == {0: math.inf}


def test_equal_scores_are_told_apart_by_their_labels():
    same = dict.fromkeys(range(10), 1.0)
    assert halving_of().stop(1, same) == halving_of().stop(1, dict(reversed(same.items())))


def test_a_restored_halving_continues_as_the_first_would():
    one, other = halving_of(), halving_of()
    scores = {**{label: 10.0 + label for label in range(30)}, 7: math.inf}
    one.stop(10, scores)
    other.load_state_dict(one.state_dict())
    assert other.decided(10) and not other.decided(20)
    later = {label: score * 0.7 for label, score in scores.items()}
    assert one.stop(20, later) == other.stop(20, later)
    assert one.compare(later) == other.compare(later)


def test_bad_numbers_are_refused():
    for scores in ({}, {0: -1.0}, {0: math.nan}):
        with pytest.raises(ValueError, match="scores >= 0"):
            halving_of().stop(1, scores)
        with pytest.raises(ValueError, match="scores >= 0"):
            halving_of().compare(scores)
