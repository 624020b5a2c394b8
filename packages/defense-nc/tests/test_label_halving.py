"""Labels stop by scripts: scores in, decisions out, no network."""

import json
import math
from types import SimpleNamespace

import pytest

from defense_nc.config import NCConfig
from defense_nc.engines.stopping_rules import nc_halving, stopping_starts

CONFIG = NCConfig(milestones=(10, 20), candidates=2, references=3, calm=0.75)
SPREAD = [8.0, 40, 44, 48, 50, 52, 56, 60, 70, 90]


def play(halving, scores, shrink=0.5):
    """Both milestones of a script in which every searched mask shrinks alike; who goes on."""
    searched = []
    for step in (10, 20):
        halving.stop(step, scores)
        scores = {k: v * (1 if k in halving.stopped_at else shrink) for k, v in scores.items()}
        searched.append(sorted(scores.keys() - halving.stopped_at.keys()))
    return searched, scores


def test_the_smallest_masks_and_some_around_the_median_go_on():
    first, second = play(nc_halving(CONFIG), dict(enumerate(SPREAD)))[0]
    # The four smallest and the three next to the median (51), then two and three.
    assert first == [0, 1, 2, 3, 4, 5]
    assert second == [0, 1, 3, 4, 5]


def test_however_many_labels_there_are_the_same_number_goes_on(subtests):
    for count in (10, 43, 1000):
        with subtests.test(count=count):
            scores = {0: 5.0} | {label: 50.0 + label % 17 for label in range(1, count)}
            first, second = play(nc_halving(CONFIG), scores)[0]
            assert len(first) <= 7 and len(second) <= 5
            assert 0 in second


def test_a_label_that_stands_out_is_never_dropped_whatever_its_number():
    for target in range(len(SPREAD)):
        scores = dict(enumerate(SPREAD[1:] + SPREAD[:1]))
        scores[9], scores[target] = scores[target], scores[9]
        assert target in play(nc_halving(CONFIG), scores)[0][1]


def test_a_stopped_label_keeps_its_ratio_to_the_others():
    """Masks of those that go on shrink to a quarter; a label that stopped is not larger for it."""
    halving = nc_halving(CONFIG)
    searched, scores = play(halving, dict(enumerate(SPREAD)))
    assert searched[1] == [0, 1, 3, 4, 5]
    assert halving.stopped_at == {2: 20, 6: 10, 7: 10, 8: 10, 9: 10}
    gains = halving.gains(scores)
    assert gains == pytest.approx({2: 0.5, 6: 0.25, 7: 0.25, 8: 0.25, 9: 0.25})
    assert halving.compare(scores) == pytest.approx({k: v / 4 for k, v in enumerate(SPREAD)})


def test_the_gain_is_that_of_the_control_labels_not_of_the_candidates():
    halving = nc_halving(CONFIG)
    scores = dict(enumerate(SPREAD))
    halving.stop(10, scores)
    assert halving.control_labels == (4, 5, 3)
    scores |= {0: 1.0, 1: 2.0, 2: 3.0, 3: 24.0, 4: 25.0, 5: 26.0}
    assert halving.gains(scores)[9] == pytest.approx(0.5)
    assert halving.compare(scores)[9] == pytest.approx(45)


def searches(*norms, successes=None):
    successes = successes or [1.0] * len(norms)
    return [
        SimpleNamespace(start=start, norm=norm, success=success)
        for start, (norm, success) in enumerate(zip(norms, successes, strict=True))
    ]


def test_starts_are_halved_and_one_goes_on_from_the_last_milestone():
    own = searches(9.0, 7.0, 8.0)
    assert [one.start for one in stopping_starts(own, last=False)] == [0]
    assert [one.start for one in stopping_starts(own, last=True)] == [2, 0]


def test_among_starts_without_success_the_nearer_one_goes_on():
    own = searches(math.inf, math.inf, successes=[0.2, 0.7])
    assert [one.start for one in stopping_starts(own, last=False)] == [0]


def test_a_label_not_reached_yet_stops_at_the_last_milestone():
    halving = nc_halving(CONFIG)
    scores = {0: 8.0, 1: 40.0, 2: 44.0, 3: 50.0, 4: 51.0, 5: math.inf}
    assert 5 not in halving.stop(10, scores)
    assert 5 in halving.stop(20, scores)
    assert halving.compare(scores | {0: 4.0})[5] == math.inf


def test_it_goes_on_when_no_label_has_been_reached_before_the_last_milestone():
    halving = nc_halving(CONFIG)
    scores = dict.fromkeys(range(4), math.inf)
    assert halving.stop(10, scores) == ()
    assert halving.stop(20, scores) == (0, 1, 2, 3)


def test_all_stop_when_nothing_stands_out():
    halving = nc_halving(CONFIG)
    even = {label: 40.0 + label for label in range(6)}
    assert len(halving.stop(10, even)) < 6
    halving.stop(20, even)
    assert halving.stopped_at.keys() == even.keys()
    assert halving.compare(even) == pytest.approx(even)


def test_its_state_goes_through_json():
    halving, again = nc_halving(CONFIG), nc_halving(CONFIG)
    scores = dict(enumerate([*SPREAD, math.inf]))
    halving.stop(10, scores)
    again.load_state_dict(json.loads(json.dumps(halving.state_dict(), allow_nan=False)))
    assert again.decided(10) and not again.decided(20)
    scores = {k: v if k in halving.stopped_at else 5.0 + k for k, v in scores.items()}
    assert again.stop(20, scores) == halving.stop(20, scores)
    assert again.compare(scores) == halving.compare(scores)


def test_refusals(subtests):
    for scores in ({}, {0: -1.0}, {0: math.nan}):
        with subtests.test(scores=scores), pytest.raises(ValueError, match="scores"):
            nc_halving(CONFIG).stop(10, scores)
