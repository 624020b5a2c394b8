from __future__ import annotations

import pytest
import torch
from torch import nn

from defense_reverse import ReverseConfig
from defense_reverse.label_state import Candidate, LabelState, measure, round_subset

CONFIG = ReverseConfig(success_floor=0.9, fallbacks=2, patience=3)
START = Candidate(0.1, 0.0, torch.zeros(1))


def play(*rounds: tuple[float, float], config: ReverseConfig = CONFIG) -> LabelState:
    """A state after rounds of (success rate, residual); the weights number the rounds."""
    state = LabelState(config, START)
    for number, (rate, residual) in enumerate(rounds, 1):
        state.update(Candidate(rate, residual, torch.full((1,), float(number))))
    return state


def kept(state: LabelState) -> list[int]:
    return [int(found.weights) for found in state.candidates]


def test_above_the_floor_the_smallest_residual_is_the_best():
    state = play((0.95, 0.5), (1.0, 0.3), (0.92, 0.4))
    assert state.score == 0.3 and kept(state) == [2, 3]


def test_below_the_floor_the_highest_success_is_the_best_and_there_is_no_score():
    state = play((0.5, 0.9), (0.7, 0.95), (0.6, 0.1))
    assert state.score == float("inf") and kept(state) == [2, 3]


def test_success_counts_before_the_residual():
    assert kept(play((0.89, 0.01), (0.9, 0.8))) == [2, 1]


def test_a_start_that_reaches_the_floor_counts():
    state = LabelState(CONFIG, Candidate(1.0, 0.0, torch.zeros(1)))
    assert state.score == 0


def test_the_weight_follows_the_rounds():
    assert play((0.1, 0.1), (0.1, 0.1)).search.value == pytest.approx(CONFIG.lambdas[0] * 4)


def test_a_label_is_finished_after_rounds_without_a_smaller_residual():
    good, worse = (0.95, 0.3), (0.95, 0.4)
    assert not play(good, worse, worse).finished
    assert play(good, worse, worse, worse).finished
    assert not play(good, worse, worse, (0.95, 0.2), worse).finished
    assert not play(*[(0.1, 0.3)] * 9).finished  # without a score it goes on
    assert not play(good, *[worse] * 9, config=ReverseConfig(success_floor=0.9)).finished


def test_the_best_is_the_next_best_where_the_best_falls_short_on_all_images():
    state = play((0.95, 0.5), (0.95, 0.3))
    on_all = {2: (0.85, 0.31), 1: (0.93, 0.52)}
    found = state.best(lambda weights: on_all[int(weights)])
    assert (found.success_rate, found.residual, int(found.weights)) == (0.93, 0.52, 1)


def test_the_best_is_the_nearest_where_all_fall_short():
    state = play((0.95, 0.5), (0.95, 0.3))
    on_all = {2: (0.85, 0.31), 1: (0.8, 0.52)}
    assert int(state.best(lambda weights: on_all[int(weights)]).weights) == 2


def test_a_restored_state_continues_as_the_first_would():
    one = play((0.5, 0.3), (0.95, 0.3), (0.95, 0.4))
    other = LabelState(CONFIG, START)
    other.load_state_dict(one.state_dict())
    for state in (one, other):
        state.update(Candidate(0.92, 0.2, torch.full((1,), 9.0)))
    assert kept(one) == kept(other) and one.search.value == other.search.value
    assert one.state_dict() == other.state_dict()


def test_rounds_look_at_a_fixed_draw_of_the_images():
    indices = torch.arange(10, 40)
    some = round_subset(indices, 8, seed=3)
    assert len(some.unique()) == 8 and torch.equal(some, round_subset(indices, 8, seed=3))
    assert not torch.equal(some, round_subset(indices, 8, seed=4))
    for all_of_them in (0, 30, 99):
        assert torch.equal(round_subset(indices, all_of_them, seed=3), indices)


class Bright(nn.Module):
    """Class 1 where an image is brighter than a half."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def test_measured_are_equation_5_and_the_share_that_reaches_the_label():
    images = torch.stack([torch.full((1, 4, 4), level / 255) for level in (0, 51, 102, 153)])
    rate, residual = measure(lambda x: x + 51 / 255, Bright(), images, 1)
    # the third and the fourth image become brighter than a half
    assert rate == 0.5 and residual == pytest.approx(0.2, abs=1e-6)


def test_the_root_mean_square_is_taken_image_by_image():
    images = torch.zeros(2, 1, 2, 2)
    change = torch.zeros(2, 1, 2, 2)
    change[0, 0, 0, 0] = 102 / 255  # one pixel of four
    change[1] = 102 / 255  # all of them
    rates = [measure(lambda x: x + change, Bright(), images, 0, score=s)[1] for s in ("l1", "rms")]
    assert rates == pytest.approx([0.4 * (0.25 + 1) / 2, 0.4 * (0.5 + 1) / 2], abs=1e-6)
