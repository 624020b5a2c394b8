"""Feature-shift tuning: the head's norm and direction, and what is left without the shift."""

import copy

import pytest
import torch
from torch import nn

from defense_reverse.mitigations import FeatureShiftTuning
from wm_victim.toy_backdoors import planted_images


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )


def head(model: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = model[5].weight  # type: ignore[index]
    return weight.detach()


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_head_keeps_its_norm_and_leaves_the_suspects_direction(shift: float) -> None:
    data, model = planted_images(60), net()
    suspect = head(model).clone()
    mitigator = FeatureShiftTuning.preset(steps=30, lr=0.05, shift=shift, weight_decay=0.0)
    repaired = mitigator.repair(model, data.images, data.labels)
    tuned = head(repaired.model)
    assert torch.equal(head(model), suspect)
    assert float(tuned.norm()) == pytest.approx(float(suspect.norm()), rel=1e-5)
    cosine = float((tuned * suspect).sum() / suspect.norm() ** 2)
    assert cosine < -0.5 if shift else cosine > -0.5


def test_the_inner_product_is_a_part_of_the_loss() -> None:
    """One step of SGD on the head alone, by hand."""
    data, model = planted_images(32), net().requires_grad_(False)
    model[5].requires_grad_(True)
    suspect = head(model).clone()
    settings = {"steps": 1, "batch_size": 32, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1}
    a, b = (
        head(
            FeatureShiftTuning.preset(shift=shift, **settings)
            .repair(copy.deepcopy(model), data.images, data.labels)
            .model
        )
        for shift in (0.0, 2.0)
    )
    # Both were set to one length: what is left is the direction, a step of -lr * shift * W0 apart.
    basis = torch.stack([a.flatten(), suspect.flatten()], 1)
    solution = torch.linalg.lstsq(basis, b.flatten()[:, None])
    assert float((basis @ solution.solution - b.flatten()[:, None]).norm()) < 1e-5
    assert float(solution.solution[1]) < 0


def test_shift_is_not_negative() -> None:
    with pytest.raises(ValueError, match="shift >= 0"):
        FeatureShiftTuning(shift=-0.1)
