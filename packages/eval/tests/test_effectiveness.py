"""What a mitigation has achieved, from known outcomes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from wm_eval.effectiveness import der, der_interval, mitigation_values
from wm_eval.robustness import Outcomes


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


def test_values_by_hand() -> None:
    values = mitigation_values(counted(90, 90), counted(88, 9), backdoored=True)
    assert values["before"]["cda"] == 0.9 and values["after"]["asr"] == 0.1
    assert values["cda_change"]["value"] == pytest.approx(-0.02)
    assert values["cda_change"]["only_second"] == 2
    assert values["asr_change"]["value"] == pytest.approx(-0.9) and values["asr_change"]["n"] == 90
    assert values["der"] == pytest.approx(0.94)
    low, high = values["der_interval"]
    assert low < values["der"] < high


def test_a_clean_model_has_no_attack_to_lose() -> None:
    values = mitigation_values(counted(90, 3), counted(80, 3), backdoored=False)
    assert values["cda_change"]["value"] == pytest.approx(-0.1)
    assert values["asr_change"] is values["der"] is values["der_interval"] is None


def test_values_refuse_other_images() -> None:
    with pytest.raises(ValueError, match="one length"):
        mitigation_values(counted(90, 90), counted(90, 90, 200), backdoored=False)
