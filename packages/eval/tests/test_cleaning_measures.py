"""What a cleaning achieved, from known outcomes; its settings, and its methods by name."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from wm_eval.attacks.profiles import DATA, attack_profile
from wm_eval.cleaning.config import METHODS, RESCANNED, SCANNED_BY, TITLES, CleaningConfig
from wm_eval.cleaning.measures import cleaning_values, der, der_interval
from wm_eval.cleaning.methods import build_method
from wm_eval.cleaning.profiles import cleaning_profile
from wm_eval.robustness import Outcomes
from wm_inject.attacks import PROFILES


def counted(correct: int, opened: int, n: int = 100) -> Outcomes:
    """A victim on n images, the last tenth of them of the target class."""
    place = torch.arange(n)
    attacked = place < n * 9 // 10
    return Outcomes(place < correct, attacked, (place < opened) & attacked, place < 0)


@pytest.mark.parametrize(
    ("before", "after", "rating"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # all of the attack, none of the accuracy
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing done
        ((0.9, 1.0), (0.8, 0.0), 0.95),
        ((0.9, 1.0), (0.0, 0.0), 0.55),  # a model that answers nothing right any more
        ((0.9, 0.5), (0.1, 0.5), 0.1),
        ((1.0, 0.0), (0.0, 1.0), 0.0),
        ((0.8, 1.0), (0.9, 0.2), 0.9),  # a rise in accuracy earns nothing
        ((0.9, 0.2), (0.9, 0.8), 0.5),  # nor does a rise in attack success cost anything
    ],
)
def test_rating_by_hand(
    before: tuple[float, float], after: tuple[float, float], rating: float
) -> None:
    assert der(*before, *after) == pytest.approx(rating)


def test_a_loss_of_accuracy_lowers_the_rating() -> None:
    # With the sign of a benchmark's function, the costlier of the two would be the better one.
    assert der(0.9, 1.0, 0.5, 0.0) < der(0.9, 1.0, 0.9, 0.0)


def test_rating_stays_between_zero_and_one() -> None:
    for rates in itertools.product((0.0, 0.3, 1.0), repeat=4):
        assert 0 <= der(*rates) <= 1


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, "0.5", None])
@pytest.mark.parametrize("place", range(4))
def test_rating_refuses_what_is_no_rate(bad: Any, place: int) -> None:
    rates: list[Any] = [0.9, 0.9, 0.9, 0.9]
    rates[place] = bad
    with pytest.raises(ValueError, match=r"expected (acc|asr)_(before|after) in \[0, 1\]"):
        der(*rates)


def test_interval_holds_the_rating_and_narrows() -> None:
    few = der_interval(counted(90, 90), counted(85, 5))
    many = der_interval(counted(900, 900, 1000), counted(850, 50, 1000))
    rating = der(0.9, 1.0, 0.85, 5 / 90)
    assert few.low < many.low < rating < many.high < few.high
    assert few.low >= 0 and few.high <= 1


def test_values_of_a_cleaning_by_hand() -> None:
    values = cleaning_values(counted(90, 90), counted(88, 9), backdoored=True)
    assert values["before"]["cda"] == 0.9 and values["after"]["asr"] == 0.1
    assert values["acc_change"]["value"] == pytest.approx(-0.02)
    assert values["acc_change"]["only_second"] == 2
    assert values["asr_change"]["value"] == pytest.approx(-0.9) and values["asr_change"]["n"] == 90
    assert values["der"] == pytest.approx(0.94)
    low, high = values["der_interval"]
    assert low < values["der"] < high


def test_a_clean_model_has_no_attack_to_lose() -> None:
    values = cleaning_values(counted(90, 3), counted(80, 3), backdoored=False)
    assert values["acc_change"]["value"] == pytest.approx(-0.1)
    assert values["asr_change"] is values["der"] is values["der_interval"] is None


def test_values_refuse_other_images() -> None:
    with pytest.raises(ValueError, match="one length"):
        cleaning_values(counted(90, 90), counted(90, 90, 200), backdoored=False)


@pytest.mark.parametrize(
    "change",
    [
        {"methods": ()},
        {"methods": ("soap",)},
        {"settings": {"soap": {}}},
        {"shares": ()},
        {"shares": (0.0,)},
        {"shares": (1.1,)},
        {"shares": (0.01, 0.01)},
        {"steps": 0},
        {"images": 1},
        {"preset": "vast"},
        {"alpha": 1.0},
    ],
)
def test_settings_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        CleaningConfig(**change)


def test_settings_bring_everything_in_the_order_of_the_tables() -> None:
    study = attack_profile("tiny", "digits", attacks=("wanet", "clean", "badnets"))
    config = CleaningConfig(study=study, methods=("nad", "unlearning-reverse", "fine-tuning"))
    assert config.attacks == ("clean", "badnets", "wanet")
    assert config.rows == ("unlearning-reverse", "fine-tuning", "nad")
    assert config.detectors == ("reverse",)
    assert CleaningConfig(methods=("anp",)).detectors == ()
    assert CleaningConfig(study=attack_profile(attacks=("sig",))).attacks == ("sig",)
    assert set(RESCANNED) <= set(SCANNED_BY) <= set(METHODS) == set(TITLES)


@pytest.mark.parametrize("data", [*DATA, "some/folder"])
def test_profiles(data: str) -> None:
    for profile in PROFILES:
        config = cleaning_profile(profile, data)
        assert config.attacks[0] == "clean" and config.rows == METHODS
        # The victims are those of the attack study of the same name, so that they can be shared.
        same = attack_profile(profile, data)
        for name in ("data", "victim", "train", "joint", "settings", "target", "watched_images"):
            assert getattr(config.study, name) == getattr(same, name)
        for name in config.rows:
            build_method(name, **config.told(name))


def test_profiles_can_be_changed() -> None:
    config = cleaning_profile("tiny", "digits", attacks=("wanet",), seeds=(3,), shares=(0.5,))
    assert (config.attacks, config.study.seeds, config.shares) == (("wanet",), (3,), (0.5,))
    mirrored = cleaning_profile("paper", "cifar10").settings
    assert not mirrored
    assert cleaning_profile("paper", "gtsrb").settings["nad"] == {"augmentation": "crop"}
    with pytest.raises(ValueError, match="expected a profile in"):
        cleaning_profile("vast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected fields of CleaningConfig"):
        cleaning_profile(soap=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_same_steps(name: str) -> None:
    for preset in ("fast", "paper"):
        method = build_method(name, steps=7, preset=preset)
        kind = "fine-tuning" if name == "control" else name
        assert method.name == ("unlearning" if kind.startswith("unlearning-") else kind)
        steps = getattr(getattr(method, "sgd", method), "steps", None)
        assert steps == (None if name == "neuron-pruning" else 7)


def test_the_control_of_unlearning_differs_in_nothing_but_the_triggers() -> None:
    for told in ({}, {"preset": "paper"}, {"lr": 0.5}):
        config = CleaningConfig(settings={"unlearning-reverse": told})
        control, cleaning = (
            vars(build_method(name, **config.told(name)))
            for name in ("control", "unlearning-reverse")
        )
        assert control.items() <= cleaning.items()
        assert cleaning["append"] and cleaning["trigger_share"] == 1
    own = CleaningConfig(settings={"unlearning-reverse": {"lr": 0.5}, "control": {"lr": 0.1}})
    assert own.told("control")["lr"] == 0.1
    in_place = vars(build_method("unlearning-nc", steps=7))
    assert not in_place["append"] and in_place["trigger_share"] == 0.2


def test_methods_refuse() -> None:
    with pytest.raises(ValueError, match="expected a method out of"):
        build_method("soap", steps=1)
    with pytest.raises(ValueError, match="expected"):
        build_method("fine-tuning", steps=0)
    with pytest.raises(ValueError, match="expected a preset in"):
        build_method("nad", steps=10, preset="vast")
    with pytest.raises(ValueError, match="expected settings of ANP"):
        build_method("anp", steps=10, soap=1)
