"""The cost schedule follows scripts; no network is needed to know what it does."""

import math

import pytest

from defense_nc import CostSchedule, NCConfig

PAPER = NCConfig.preset("paper", patience=2)
DOWN = 2**1.5


def play(config, successes, norms=None):
    """The cost after every step of a script."""
    schedule = CostSchedule(config)
    costs = []
    for step, success in enumerate(successes):
        schedule.update(success, math.inf if norms is None else norms[step])
        costs.append(schedule.cost)
    return costs, schedule


def test_the_mask_is_free_until_it_has_succeeded_for_long_enough():
    costs, _ = play(PAPER, [0.5, 1, 0.5, 1, 1])
    assert costs == [0, 0, 0, 0, 1e-3]


def test_then_success_raises_the_cost_and_failure_lowers_it():
    # The step that ends the free phase is also the first of the next two.
    costs, _ = play(PAPER, [1, 1, 1, 1, 1, 0, 0, 0, 0])
    expected = [0, 1e-3, 2e-3, 2e-3, 4e-3, 4e-3, 4e-3 / DOWN, 4e-3 / DOWN, 4e-3 / DOWN**2]
    assert costs == pytest.approx(expected)


def test_a_break_in_the_run_starts_the_count_again():
    costs, _ = play(PAPER, [1, 1, 0, 1, 0, 1, 1])
    assert costs == pytest.approx([0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 2e-3])


def test_exactly_the_threshold_is_success():
    costs, _ = play(PAPER, [0.99, 0.99])
    assert costs[-1] == 1e-3


def test_failure_while_the_mask_is_free_changes_nothing():
    costs, schedule = play(PAPER, [0, 0, 0, 0, 0])
    assert costs == [0] * 5
    assert not schedule.stop


def test_the_ports_charge_at_once():
    config = NCConfig.preset("ports", patience=2)
    costs, _ = play(config, [0, 0, 1, 1])
    assert costs == pytest.approx([1e-3, 1e-3 / DOWN, 1e-3 / DOWN, 1e-3 / DOWN * 2])


def stops_after(config, successes, norms):
    schedule = CostSchedule(config)
    for step, (success, norm) in enumerate(zip(successes, norms, strict=True)):
        schedule.update(success, norm)
        if schedule.stop:
            return step + 1
    return None


def test_early_stop_needs_a_rise_and_a_fall_and_no_better_norm():
    config = NCConfig.preset("paper", patience=1, early_stop_patience=3)
    rise_and_fall = [1, 1, 0, 0, 0, 0, 0, 0]
    # Step 1 counts as an improvement on nothing; 2, 3 and 4 do not improve.
    assert stops_after(config, rise_and_fall, [5.0] * 8) == 4
    assert stops_after(config, [1] * 8, [5.0] * 8) is None
    assert stops_after(config, rise_and_fall, [8.0, 7, 6, 5, 4, 3, 2, 1]) is None


def test_a_fall_in_the_free_phase_does_not_count():
    config = NCConfig.preset("paper", patience=1, early_stop_patience=2)
    assert stops_after(config, [0, 1, 1, 1, 1], [math.inf, 5, 5, 5, 5]) is None


def test_a_small_improvement_counts_as_none_when_the_threshold_says_so():
    norms = [100 * 0.995**step for step in range(8)]
    script = [1, 1, 0, 0, 0, 0, 0, 0]
    strict = NCConfig.preset("paper", patience=1, early_stop_patience=3, early_stop_threshold=0.99)
    exact = NCConfig.preset("paper", patience=1, early_stop_patience=3)
    assert stops_after(strict, script, norms) == 4
    assert stops_after(exact, script, norms) is None


def test_no_early_stop_when_switched_off():
    config = NCConfig.preset("paper", patience=1, early_stop_patience=3, early_stop=False)
    assert stops_after(config, [1, 1, 0, 0, 0, 0, 0, 0], [5.0] * 8) is None


def test_presets():
    paper = NCConfig.preset("paper")
    assert (paper.lr, paper.betas, paper.batch_size) == (0.1, (0.5, 0.9), 32)
    assert (paper.steps, paper.batches, paper.threshold) == (1000, 31, 0.99)
    assert (paper.init_cost, paper.patience, paper.multiplier) == (1e-3, 5, 2.0)
    assert (paper.early_stop_threshold, paper.early_stop_patience) == (1.0, 25)
    ports = NCConfig.preset("ports")
    assert (ports.schedule, ports.starts, ports.threshold) == ("ports", ("ones",), 0.98)
    assert NCConfig.preset("robust") == NCConfig()
    fast = NCConfig.preset("fast")
    assert 100 <= fast.steps * fast.batches <= 300
    assert NCConfig.preset("fast", steps=7).steps == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batches": 0},
        {"batch_size": 0},
        {"patience": 0},
        {"early_stop_patience": 0},
        {"fallbacks": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"init_cost": 0.0},
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"floor": 1.5},
        {"early_stop_threshold": 99.0},
        {"multiplier": 1.0},
        {"betas": (0.5,)},
        {"betas": (0.5, 1.0)},
        {"schedule": "later"},
        {"starts": ("zeros",)},
        {"starts": ()},
    ],
    ids=str,
)
def test_refused_settings(wrong):
    with pytest.raises(ValueError, match="expected"):
        NCConfig(**wrong)


def test_refused_preset_and_step():
    with pytest.raises(ValueError, match="preset"):
        NCConfig.preset("slow")
    schedule = CostSchedule(NCConfig())
    for success, norm in [(1.1, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.5, -1.0), (0.5, math.nan)]:
        with pytest.raises(ValueError, match="expected success"):
            schedule.update(success, norm)
