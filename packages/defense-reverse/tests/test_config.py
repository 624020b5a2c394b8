from __future__ import annotations

from dataclasses import replace

import pytest

from defense_reverse import LambdaSearch, ReverseConfig
from defense_reverse.config import PRESETS


def follow(script: str, start: float = 1.0, **factors: float) -> list[float]:
    """The weights after each answer of a script of s(uccess) and f(ailure)."""
    search = LambdaSearch(start, **factors)
    return [round(search.update(success=letter == "s"), 6) for letter in script]


def test_only_failures_double_the_weight():
    assert follow("fff") == [2, 4, 8]


def test_only_successes_shrink_it():
    assert follow("sss") == [round(1.5**-n, 6) for n in (1, 2, 3)]


def test_between_a_failure_and_a_success_it_bisects():
    # 1 fails, 2 fails, 4 succeeds: then the geometric means of the last failure and last success
    assert follow("ffs") == [2, 4, round(8**0.5, 6)]
    assert follow("ffsf")[-1] == round((8**0.5 * 4) ** 0.5, 6)
    assert follow("ffss")[-1] == round((2 * 8**0.5) ** 0.5, 6)


def test_a_narrow_bracket_opens_again_by_the_small_factor():
    search = LambdaSearch(1.0, growth=2, shrink=1.5)
    search.update(success=False)
    while True:
        before = search.value
        search.update(success=True)
        if search.value < 1:  # under the old failure, which the generator has outgrown
            break
    assert before <= 1.1 and search.value == pytest.approx(before / 1.5)
    # a failure close below a success opens upwards
    assert follow("sf", start=1.05)[-1] == pytest.approx((0.7 * 1.05) ** 0.5, abs=1e-6)
    # 0.7 f, .857 f, .949 f: within 1.1 of the success at 1.05... and so on until it opens
    values = follow("sfffff", start=1.05)
    assert values[-1] > 1.05


def test_the_search_stays_at_zero_if_the_attack_is_off():
    assert follow("fsf", start=0.0) == [0, 0, 0]


def test_a_simulated_label_is_met_at_its_threshold():
    # success exactly where the weight is at least 0.037: the search ends around there
    search = LambdaSearch(1e-3)
    tried = []
    for _ in range(40):
        tried.append(search.value)
        search.update(success=search.value >= 0.037)
    reached = min(value for value in tried if value >= 0.037)
    assert reached < 0.037 * 1.1


def test_bad_factors_are_refused(subtests):
    for start, factors in [(-1, {}), (float("nan"), {}), (1, {"growth": 1}), (1, {"shrink": 0.5})]:
        with (
            subtests.test(start=start, factors=factors),
            pytest.raises(ValueError, match="expected"),
        ):
            LambdaSearch(start, **factors)


def test_presets_carry_their_names_and_the_paper_its_constants():
    for name in ("paper", "robust", "fast"):
        assert ReverseConfig.preset(name).name == name
    paper = ReverseConfig.preset("paper")
    assert paper.lambdas == (0.1, 1.0, 0.1) and paper.lr == 1e-3 and not paper.residual
    assert ReverseConfig().residual
    assert ReverseConfig() == ReverseConfig.preset("fast")
    assert ReverseConfig.preset("fast", steps=7).steps == 7


def test_a_changed_preset_has_a_star_so_that_its_calibration_is_not_used():
    for name in PRESETS:
        assert ReverseConfig.preset(name, lr=1.0).name == f"{name}*"
        assert replace(ReverseConfig.preset(name), lr=1.0).name == f"{name}*"
        assert ReverseConfig.preset(name, lr=ReverseConfig.preset(name).lr).name == name
    assert ReverseConfig(steps=3).name == "fast*" and ReverseConfig(steps=120).name == "fast"
    # changed back, it is the preset again
    assert replace(ReverseConfig(steps=3), steps=120).name == "fast"
    assert ReverseConfig(name="mine", steps=3).name == "mine"


def test_how_it_is_computed_is_not_part_of_a_preset():
    changes = {"precision": "float32", "stack": "vmapped"}
    assert ReverseConfig.preset("fast", **changes, images_at_once=9).name == "fast"
    assert ReverseConfig.preset("fast", race=False).name == "fast*"
    assert ReverseConfig.preset("paper", engine="one-by-one").name == "paper"


def test_the_reference_is_robust_in_float32_one_label_after_the_other():
    reference = ReverseConfig.preset("reference")
    assert (reference.engine, reference.precision, reference.race) == (
        "one-by-one",
        "float32",
        False,
    )
    back = {"name": "robust", "engine": "together", "precision": "auto", "race": True}
    assert replace(reference, **back) == ReverseConfig.preset("robust")


def test_labels_are_compared_at_the_ends_of_rounds_and_at_the_end():
    assert ReverseConfig(steps=100, round_steps=20, milestones=(0.3, 0.5)).stops() == (40, 60, 100)
    assert ReverseConfig(steps=90, round_steps=20, milestones=()).stops() == (90,)
    # two milestones in one round are one, and one behind the end is none
    assert ReverseConfig(steps=30, round_steps=20, milestones=(0.1, 0.2, 0.9)).stops() == (20, 30)
    assert ReverseConfig(steps=0).stops() == (0,)


def test_a_restored_search_goes_on_as_the_first_would():
    one, other = LambdaSearch(1.0), LambdaSearch(5.0)
    for success in (False, False, True):
        one.update(success=success)
    other.load_state_dict(one.state_dict())
    assert [one.update(success=x) for x in (True, False)] == [
        other.update(success=x) for x in (True, False)
    ]


def test_settings_out_of_range_are_refused(subtests):
    for changes in [
        {"width": 0},
        {"batch_size": 0},
        {"round_steps": 0},
        {"steps": -1},
        {"pretrain_steps": -1},
        {"lr": 0},
        {"lambdas": (0.1, 1.0)},
        {"lambdas": (-0.1, 1.0, 0.0)},
        {"lambdas": (float("nan"), 1.0, 0.0)},
        {"success_floor": 0},
        {"success_floor": 1.1},
        {"growth": 1},
        {"shrink": 1},
        {"precision": "half"},
        {"engine": "fast"},
        {"engine": "one-by-one"},  # with the race
        {"stack": "grouped"},
        {"round_images": -1},
        {"fallbacks": 0},
        {"patience": -1},
        {"candidates": 0},
        {"references": 0},
        {"images_at_once": 0},
        {"milestones": (0.5, 0.5)},
        {"milestones": (0.0,)},
        {"milestones": (1.0,)},
    ]:
        with subtests.test(changes=changes), pytest.raises(ValueError, match="expected"):
            ReverseConfig(**changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="expected a preset"):
        ReverseConfig.preset("best")
