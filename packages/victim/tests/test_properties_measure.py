"""Accuracy and attack success: bounds, and what a loop over the images counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wm_victim import ImageSet, accuracy, attack_success, predict

STEADY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
CLASSES = 4


class Brightness(nn.Module):
    """Class k for images whose first pixel is about k / 3; two layers behave as if in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.drop = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        first = self.drop(images[:, 0, 0, 0]) * self.scale
        levels = torch.arange(CLASSES, device=images.device) / (CLASSES - 1)
        return -(first[:, None] - levels).abs()


class Told:
    """A trigger that writes the asked label into the images whose id is even; and keeps notes."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        assert ids is not None and target is not None and not torch.is_grad_enabled()
        self.seen += list(zip(ids.tolist(), target.tolist(), strict=True))
        marked = (target.float() / (CLASSES - 1))[:, None, None, None].expand_as(images)
        # Off the 8-bit grid by less than half a level: what is stored has it rounded away.
        return torch.where(
            (ids % 2 == 0)[:, None, None, None], (marked - 0.001).clamp(0, 1), images
        )


@st.composite
def sets(draw: st.DrawFn) -> ImageSet:
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1), st.integers(0, 99)),
            min_size=1,
            max_size=20,
        )
    )
    shown, labels, ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    images = (shown.float() / (CLASSES - 1))[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return ImageSet(images, labels, ids)


def first_pixel(data: ImageSet) -> list[int]:
    return [round(float(image[0, 0, 0]) * (CLASSES - 1)) for image in data.images]


@STEADY
@given(sets(), st.integers(1, 25))
def test_accuracy_is_what_a_loop_counts(data: ImageSet, batch_size: int) -> None:
    hits = [shown == label for shown, label in zip(first_pixel(data), data.labels, strict=True)]
    found = accuracy(Brightness(), data, batch_size=batch_size)
    assert 0 <= found <= 1
    assert found == pytest.approx(sum(map(int, hits)) / len(data))


@STEADY
@given(sets(), st.integers(0, CLASSES - 1), st.integers(1, 25))
def test_attack_success_is_what_a_loop_counts(data: ImageSet, target: int, batch_size: int) -> None:
    hits, asked = 0, []
    for shown, label, number in zip(
        first_pixel(data), data.labels.tolist(), data.ids.tolist(), strict=True
    ):
        if label != target:
            asked.append((number, target))
            hits += target == (target if number % 2 == 0 else shown)
    trigger = Told()
    if not asked:
        with pytest.raises(ValueError, match=f"other classes than the target {target}, got none"):
            attack_success(Brightness(), data, trigger, target=target)
        return
    found = attack_success(Brightness(), data, trigger, target=target, batch_size=batch_size)
    assert 0 <= found <= 1
    assert found == hits / len(asked)
    assert trigger.seen == asked  # each image once, with its own id, and the label asked for


class Fine(nn.Module):
    """Class 1 above the middle between two levels of eight bits, or else class 0."""

    def forward(self, images: Tensor) -> Tensor:
        above = (images[:, 0, 0, 0] * 255 > 100.5).float()
        return torch.stack([1 - above, above], dim=1)


def test_the_attack_is_measured_on_stored_images() -> None:
    data = ImageSet(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    for level, success in ((100.4, 0.0), (100.45, 0.0), (101.0, 1.0)):

        def trigger(
            images: Tensor, *, ids: object = None, target: object = None, level: float = level
        ) -> Tensor:
            return torch.full_like(images, level / 255)

        assert attack_success(Fine(), data, trigger, target=1) == success

    def between(images: Tensor, *, ids: object = None, target: object = None) -> Tensor:
        return torch.full_like(images, 100.6 / 255)

    assert attack_success(Fine(), data, between, target=1) == 1.0  # stored as 101


def test_prediction_is_without_gradients_or_dropout_and_leaves_each_mode_as_it_was() -> None:
    model = Brightness()
    model.drop.eval()
    images = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    logits = predict(model, images, batch_size=1)
    assert torch.equal(logits, predict(model, images))
    assert model.training and not model.drop.training
    assert not logits.requires_grad and logits.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch size of at least 1, got {batch_size}"):
        predict(Brightness(), torch.zeros(1, 1, 2, 2), batch_size=batch_size)


@pytest.mark.parametrize("shape", [(-1,), (-1, 2, 2)])
def test_what_is_no_logits_is_refused(shape: tuple[int, ...]) -> None:
    class Reshaping(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.view(shape)

    with pytest.raises(ValueError, match="expected logits of shape"):
        predict(Reshaping(), torch.zeros(3, 1, 2, 2))
