"""Running a classifier leaves it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wm_victim.inference import frozen, images_a_pass, predict

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def linear(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, classes))


def test_a_frozen_model_is_in_eval_mode_without_gradients_and_comes_back() -> None:
    model = linear(3)
    model[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, False]


def test_logits_are_of_two_classes_or_more() -> None:
    assert predict(linear(2), IMAGES).shape == (3, 2)
    with pytest.raises(ValueError, match="K >= 2"):
        predict(linear(1), IMAGES)


@pytest.mark.parametrize(("side", "taken"), [(32, 64), (224, 8), (1024, 1)])
def test_a_pass_takes_fewer_of_larger_images(side: int, taken: int) -> None:
    images = torch.empty(1, 3, 1, 1).expand(100, 3, side, side)
    assert images_a_pass(images, torch.device("cpu"), most=64) == taken


def test_the_answers_do_not_depend_on_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = linear(4), torch.rand(7, 1, 8, 8)
    whole = predict(model, images)
    monkeypatch.setattr("wm_victim.inference._VALUES", 2 * 64)
    torch.testing.assert_close(predict(model, images), whole)


def test_a_model_that_changes_its_input_changes_a_copy() -> None:
    class InPlace(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mul_(2).flatten(1)

    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    predict(InPlace(), images)
    assert torch.equal(images, before)
