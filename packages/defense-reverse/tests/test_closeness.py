from __future__ import annotations

import pytest
import torch
from torch import nn

from defense_reverse.closeness import Closeness, _derangement, compare_images, compare_triggers
from wm_inject.core.images import quantize

STEP = 1 / 255


class Shift(nn.Module):
    """Adds the same number of grey levels everywhere, or a pattern of them."""

    def __init__(self, levels: float | torch.Tensor) -> None:
        super().__init__()
        self.change = torch.as_tensor(levels) * STEP

    def forward(self, images, *, ids=None, target=None):
        return (images + self.change).clamp(0, 1)


class Follow(nn.Module):
    """Adds a change that depends on the image: ``scale`` times a pattern that its corner seeds."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images, *, ids=None, target=None):
        seeds = (images[:, 0, 0, 0] * 255).round().long().tolist()
        return images + self.scale * STEP * torch.stack([pattern(seed) for seed in seeds])


def pattern(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (1, 8, 8), generator=generator).float() * 2 - 1


@pytest.fixture
def images() -> torch.Tensor:
    """Grey images whose first pixels all differ, far enough from black and white."""
    levels = torch.randint(90, 160, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    levels[:, 0, 0, 0] = torch.arange(100, 112)
    return levels * STEP


def test_the_true_trigger_itself_is_as_close_as_can_be(images):
    found = compare_triggers(Follow(5), Follow(5), images)
    assert found.psnr == 100 and found.explained == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert found.energy_reversed == found.energy_true == pytest.approx((5 * STEP) ** 2, rel=1e-4)
    # 64 signs of different images agree by chance only
    assert abs(found.cosine_shuffled) < 0.1


def test_a_change_that_ignores_its_image_has_the_same_cosine_when_shuffled(images):
    found = compare_triggers(Shift(4), Shift(8), images)
    assert (found.cosine, found.cosine_shuffled) == pytest.approx((1, 1))


def test_half_of_the_change_explains_three_quarters_of_it(images):
    found = compare_triggers(Follow(4), Follow(8), images)
    assert found.cosine == pytest.approx(1)
    assert found.explained == pytest.approx(0.75)  # 1 - (1 - 1/2)^2
    assert found.energy_true == pytest.approx(4 * found.energy_reversed)
    # MSE 4 grey levels squared against 8: half the distance is 6 dB
    assert found.psnr == pytest.approx(20 * torch.tensor(255 / 4).log10().item(), abs=1e-2)
    assert found.psnr - found.psnr_clean == pytest.approx(6.02, abs=0.01)


def test_a_copy_is_no_closer_than_the_clean_image(images):
    found = compare_triggers(Shift(0), Follow(6), images)
    assert found.psnr == found.psnr_clean
    assert found.cosine == found.cosine_shuffled == found.explained == 0


def test_the_opposite_change_is_further_away_than_none(images):
    found = compare_triggers(Shift(-3), Shift(3), images)
    assert found.cosine == pytest.approx(-1) and found.explained == pytest.approx(-3)
    assert found.psnr < found.psnr_clean


def test_changes_at_right_angles_have_nothing_in_common(images):
    left = torch.ones(8, 8)
    left[:, 4:] = 0
    found = compare_triggers(Shift(left * 5), Shift((1 - left) * 5), images)
    assert found.cosine == 0


def test_a_true_trigger_that_changes_nothing_is_not_divided_by(images):
    found = compare_triggers(Shift(3), Shift(0), images)
    assert found.energy_true == found.cosine == found.explained == 0 and found.psnr_clean == 100


def test_ids_and_target_reach_the_true_trigger(images):
    class ByNumber(nn.Module):
        def forward(self, images, *, ids=None, target=None):
            return images + (ids + target)[:, None, None, None] * STEP

    wide = images.repeat(30, 1, 1, 1)[:300]  # more than one chunk
    ids = torch.arange(300) % 7
    found = compare_triggers(Shift(0), ByNumber(), wide, ids=ids, target=2)
    assert found.energy_true == pytest.approx(float(((ids + 2.0) * STEP).square().mean()), rel=1e-4)


def test_the_same_seed_gives_the_same_figures(images):
    one, same, other = (compare_triggers(Follow(3), Follow(3), images, seed=s) for s in (0, 0, 1))
    assert isinstance(one, Closeness) and one == same
    assert other.cosine_shuffled != one.cosine_shuffled


def test_images_that_carry_the_triggers_give_the_same_figures(images):
    found, truth = quantize(Follow(3)(images)), quantize(Shift(4)(images))
    assert compare_images(found, truth, images) == compare_triggers(Follow(3), Shift(4), images)


def test_one_image_has_no_other_to_be_compared_with(images):
    one = images[:1]
    found = compare_images(quantize(Shift(2)(one)), quantize(Shift(4)(one)), one)
    assert found.cosine == pytest.approx(1) and found.cosine_shuffled == 0
    assert found.explained == pytest.approx(0.75)


def test_the_cosine_is_that_of_torch(images):
    found, truth = quantize(Follow(3)(images)), quantize(Shift(4)(images))
    clean = quantize(images)
    known = nn.functional.cosine_similarity(
        (found - clean).flatten(1), (truth - clean).flatten(1)
    ).mean()
    assert compare_images(found, truth, images).cosine == pytest.approx(float(known), abs=1e-6)


def test_no_image_is_compared_with_itself(subtests):
    for count in [2, 3, 50]:
        with subtests.test(count=count):
            for seed in range(5):
                order = _derangement(count, seed)
                assert sorted(order.tolist()) == list(range(count))
                assert not bool((order == torch.arange(count)).any())


def test_bad_input_is_refused(images):
    for bad in (images[:0], images[0], images.double(), images + 1):
        with pytest.raises(ValueError, match="expected"):
            compare_triggers(Shift(1), Shift(1), bad)
    with pytest.raises(ValueError, match="at least two images"):
        compare_triggers(Shift(1), Shift(1), images[:1])

    class Smaller(nn.Module):
        def forward(self, images, *, ids=None, target=None):
            return images[..., 1:]

    with pytest.raises(ValueError, match="triggered images of shape"):
        compare_triggers(Shift(1), Smaller(), images)
    for pair in ((images[:2], images), (images, images[:, :, 1:]), (images, images + 1)):
        with pytest.raises(ValueError, match="expected"):
            compare_images(*pair, images)
    with pytest.raises(ValueError, match="expected"):
        compare_images(images, images, images[:2])
