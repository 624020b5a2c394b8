"""The cost schedule follows scripts; no network is needed to know what it does."""

import json
import math
from dataclasses import replace

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
    assert NCConfig.preset("fast") == NCConfig.preset() == NCConfig()
    fast = NCConfig.preset("fast")
    assert fast.steps * fast.batches <= 130 and len(fast.starts) >= 2
    assert fast.race and fast.milestones[-1] < fast.steps
    for config in (paper, ports, NCConfig.preset("reference")):
        assert (config.race, config.precision) == (False, "float32")
    assert (
        replace(NCConfig.preset("reference"), engine="stacked").steps
        == NCConfig.preset("robust").steps
    )
    assert NCConfig.preset("fast", steps=7).steps == 7


def test_a_preset_with_changes_is_not_that_preset():
    assert NCConfig.preset("fast").name == "fast"
    assert NCConfig.preset("fast", steps=NCConfig.preset("fast").steps).name == "fast"
    changed = NCConfig.preset("fast", steps=7)
    assert changed.name == "fast*"
    assert replace(changed, lr=1.0).name == "fast*"
    assert replace(NCConfig(), steps=7).name == NCConfig(steps=7).name == "fast*"
    assert NCConfig.preset("robust", steps=7).name == "robust*"
    assert replace(changed, steps=NCConfig.preset("fast").steps).name == "fast"
    assert NCConfig(name="mine", steps=7).name == "mine"


def test_a_schedule_goes_on_from_its_state():
    config = NCConfig.preset("paper", patience=1, early_stop_patience=3)
    successes, norms = [1, 1, 0, 0, 1, 0, 0], [math.inf, 5, 5, 5, 4, 4, 4]
    whole = play(config, successes, norms)[1]
    for cut in range(len(norms)):
        first, second = play(config, successes[:cut], norms[:cut])[1], CostSchedule(config)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for success, norm in zip(successes[cut:], norms[cut:], strict=True):
            second.update(success, norm)
        assert vars(second) == vars(whole)


def test_refused_settings(subtests):
    for wrong in [
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
        {"engine": "both"},
        {"engine": "single"},
        {"precision": "float16"},
        {"stack": 0},
        {"candidates": 0},
        {"references": 0},
        {"calm": 0.0},
        {"calm": 1.5},
        {"milestones": ()},
        {"milestones": (0, 5)},
        {"milestones": (9, 5)},
        {"milestones": (5, 5)},
    ]:
        with subtests.test(wrong=wrong), pytest.raises(ValueError, match="expected"):
            NCConfig(**wrong)


def test_refused_preset_and_step():
    with pytest.raises(ValueError, match="preset"):
        NCConfig.preset("slow")
    schedule = CostSchedule(NCConfig())
    for success, norm in [(1.1, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.5, -1.0), (0.5, math.nan)]:
        with pytest.raises(ValueError, match="expected success"):
            schedule.update(success, norm)
