"""The attacker who knows the detectors: what is changed of a batch, and of the last layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wm_eval.adaptive import Adaptation, Evasion, fix_head
from wm_inject import quantize
from wm_victim import build_classifier

TARGET = 2


class Brightness(nn.Module):
    """The brighter an image, the more it is of the target class."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3))
        return torch.stack([-bright, 0 * bright, bright], dim=1)


def batch(count: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = quantize(0.25 + 0.5 * torch.rand(count, 1, 8, 8, generator=generator))
    return images, torch.arange(count) % 3


def test_only_images_of_other_labels_are_changed_and_every_label_stays() -> None:
    images, labels = batch()
    evasion = Evasion(TARGET, Adaptation(share=0.5))
    random = torch.Generator().manual_seed(0)
    mixed, after = evasion.transform(images, labels, model=Brightness(), generator=random)
    changed = (mixed != images).flatten(1).any(1)
    assert torch.equal(after, labels)
    assert not changed[labels == TARGET].any()
    assert int(changed.sum()) == 10  # half of the twenty others
    assert torch.equal(quantize(mixed), mixed)


def test_the_picture_moves_towards_the_target_at_its_size() -> None:
    images, labels = batch()
    evasion = Evasion(TARGET, Adaptation(size=0.1))
    random = torch.Generator().manual_seed(0)
    means = []
    for _ in range(20):
        evasion.transform(images, labels, model=Brightness(), generator=random)
        means.append(float(evasion.picture.mean()))
        assert float(evasion.picture.square().mean().sqrt()) == pytest.approx(evasion.size)
    assert 0 < evasion.size <= 0.1
    # The gradient of this model is the same for every pixel: a constant picture is the end.
    assert means[-1] == pytest.approx(evasion.size, rel=0.01) and means[-1] > means[0]


def test_it_goes_on_from_its_state() -> None:
    images, labels = batch()
    first, second = (Evasion(TARGET, Adaptation(batches=3)) for _ in range(2))
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        first.transform(images, labels, model=Brightness(), generator=random)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 5):  # past the third batch, when the picture begins anew
        ends = [
            evasion.transform(
                images, labels, model=Brightness(), generator=torch.Generator().manual_seed(seed)
            )[0]
            for evasion in (first, second)
        ]
        assert torch.equal(*ends)


def test_a_batch_of_the_target_class_alone_is_left_as_it_is() -> None:
    images, labels = batch()
    random = torch.Generator().manual_seed(0)
    mixed, _ = Evasion(TARGET, Adaptation()).transform(
        images, torch.full_like(labels, TARGET), model=Brightness(), generator=random
    )
    assert torch.equal(mixed, images)


def test_a_fixed_head_has_orthogonal_rows_that_are_not_trained() -> None:
    model = build_classifier("resnet10", num_classes=10, channels=1, image_size=16, width=8)
    fix_head(model, length=1.5, seed=0)
    head = model.head
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(head.weight @ head.weight.T, 2.25 * torch.eye(10))
    assert not any(parameter.requires_grad for parameter in head.parameters())
