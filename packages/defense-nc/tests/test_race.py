"""The race follows scripts: norms in, decisions out, no network."""

import json
import math

import pytest

from defense_nc.race import Race, Standing
from defense_nc.schedule import NCConfig

CONFIG = NCConfig(milestones=(10, 20), candidates=2, references=3, calm=0.75)
SPREAD = [8.0, 40, 44, 48, 50, 52, 56, 60, 70, 90]


def standings(norms, starts=1):
    """Every label with these norms; its further starts have come half as far."""
    return [
        Standing(label, start, norm * (1 + start), 1.0 if norm < math.inf else 0.0)
        for label, norm in norms.items()
        for start in range(starts)
    ]


def play(race, norms, shrink=0.5):
    """Both milestones of a script in which every mask shrinks alike; who is left after each."""
    left = []
    for step in (10, 20):
        leaving = race.cull(step, standings(norms))
        norms = {k: v * shrink for k, v in norms.items() if (k, 0) not in leaving}
        left.append(sorted(norms))
    return left, norms


def test_the_smallest_masks_and_some_around_the_median_go_on():
    first, second = play(Race(CONFIG), dict(enumerate(SPREAD)))[0]
    # The four smallest and the three next to the median (51), then two and three.
    assert first == [0, 1, 2, 3, 4, 5]
    assert second == [0, 1, 3, 4, 5]


def test_however_many_labels_there_are_the_same_number_goes_on(subtests):
    for count in [10, 43, 1000]:
        with subtests.test(count=count):
            norms = {0: 5.0} | {label: 50.0 + label % 17 for label in range(1, count)}
            first, second = play(Race(CONFIG), norms)[0]
            assert len(first) <= 7 and len(second) <= 5
            assert 0 in second


def test_a_label_that_stands_out_is_never_dropped_wherever_it_stands():
    for target in range(len(SPREAD)):
        norms = dict(enumerate(SPREAD[1:] + SPREAD[:1]))
        norms[9], norms[target] = norms[target], norms[9]
        assert target in play(Race(CONFIG), norms)[0][1]


def test_who_left_keeps_its_place_beside_the_bulk():
    """Masks of those that go on shrink to a quarter; a label that left is not larger for that."""
    race = Race(CONFIG)
    left, norms = play(race, dict(enumerate(SPREAD)))
    race.finish(standings(norms))
    assert left[1] == [0, 1, 3, 4, 5]
    assert race.left_at == {2: 20, 6: 10, 7: 10, 8: 10, 9: 10}
    assert race.gains == pytest.approx({2: 0.5, 6: 0.25, 7: 0.25, 8: 0.25, 9: 0.25})
    assert race.norms == pytest.approx({k: v / 4 for k, v in enumerate(SPREAD)})


def test_the_gain_is_that_of_the_references_not_of_the_candidates():
    race = Race(CONFIG)
    race.cull(10, standings(dict(enumerate(SPREAD))))
    assert race.references == (4, 5, 3)
    now = {0: 1.0, 1: 2.0, 2: 3.0, 3: 24.0, 4: 25.0, 5: 26.0}
    race.finish(standings(now))
    assert race.gains[9] == pytest.approx(0.5)
    assert race.norms[9] == pytest.approx(45)


def test_starts_are_halved_and_one_goes_on_from_the_last_milestone():
    race = Race(CONFIG)
    norms = {0: 8.0, 1: 40.0, 2: 44.0, 3: 50.0}
    leaving = race.cull(10, standings(norms, starts=3))
    assert leaving == {(label, 2) for label in norms}
    leaving = race.cull(20, standings(norms, starts=2))
    assert {(0, 1), (1, 1), (2, 1)} <= leaving and (0, 0) not in leaving


def test_among_searches_without_success_the_nearer_one_is_kept():
    race = Race(CONFIG)
    script = standings({1: 40.0, 2: 50.0, 3: 60.0})
    script += [Standing(0, 0, math.inf, 0.2), Standing(0, 1, math.inf, 0.7)]
    assert (0, 0) in race.cull(10, script)
    assert 0 not in race.left_at


def test_a_label_not_reached_yet_leaves_at_the_last_milestone():
    race = Race(CONFIG)
    norms = {0: 8.0, 1: 40.0, 2: 44.0, 3: 50.0, 4: 51.0, 5: math.inf}
    assert (5, 0) not in race.cull(10, standings(norms))
    assert (5, 0) in race.cull(20, standings(norms))
    race.finish(standings({0: 4.0}))
    assert race.norms[5] == math.inf


def test_it_goes_on_when_no_label_has_been_reached_before_the_last_milestone():
    race = Race(CONFIG)
    norms = dict.fromkeys(range(4), math.inf)
    assert race.cull(10, standings(norms)) == set()
    assert race.cull(20, standings(norms)) == {(label, 0) for label in norms}
    assert race.stopped_at is None


def test_all_stop_when_nothing_stands_out():
    race = Race(CONFIG)
    even = {label: 40.0 + label for label in range(6)}
    assert len(race.cull(10, standings(even))) < 6
    assert race.stopped_at is None
    racing = {label: norm for label, norm in even.items() if label not in race.left_at}
    assert race.cull(20, standings(racing)) == {(label, 0) for label in racing}
    assert race.stopped_at == 20
    race.finish([])
    assert race.norms == pytest.approx(even)


def test_its_state_goes_through_json():
    race, again = Race(CONFIG), Race(CONFIG)
    race.cull(10, standings(dict(enumerate([*SPREAD, math.inf]))))
    again.load_state_dict(json.loads(json.dumps(race.state_dict(), allow_nan=False)))
    assert vars(again) == vars(race)
    norms = {label: 5.0 + label for label in race.norms if label not in race.left_at}
    assert again.cull(20, standings(norms)) == race.cull(20, standings(norms))


def test_refusals():
    for step, script in [(11, standings({0: 1.0})), (10, [])]:
        with pytest.raises(ValueError, match="expected"):
            Race(CONFIG).cull(step, script)
