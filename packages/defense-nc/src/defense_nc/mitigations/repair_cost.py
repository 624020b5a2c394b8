"""What a repair cost a classifier, on images that it was not repaired with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CORRECTED = 3  # wrong answers that may have changed, in units of the loss allowed


class RepairCost(NamedTuple):
    """Accuracy and answers before and after.

    Args:
        accuracy: Before and after, in [0, 1]; None where no labels are known.
        agreement: Share of the images that get the answer of the given model.
        images: How many, 1 or more.
    """

    accuracy: tuple[float, float] | None
    agreement: float
    images: int

    def within(self, max_loss: float) -> bool:
        """Whether the model has kept what it knew, but for ``max_loss`` of the images.

        More answers may have changed where they were wrong by the labels, yet not many: a model
        that seems to be wrong often may be right, and its labels misread.
        """
        before, after = self.accuracy or (1.0, self.agreement)
        loss = max(max_loss, 1 / self.images) + 1e-9  # one image is no loss
        least = max(before, 1 - _CORRECTED * max_loss) - loss
        return after >= before - loss and self.agreement >= least

    def __str__(self) -> str:
        same = f"answers as before {self.agreement:.4f} (of {self.images} held-out images)"
        if self.accuracy is None:
            return same
        before, after = self.accuracy
        return f"accuracy {before:.4f} -> {after:.4f}, {same}"


def repair_cost(before: Tensor, after: Tensor, labels: Tensor | None = None) -> RepairCost:
    """What changed, from the answers of both models to the same images.

    Args:
        before: int64 ``(N,)``: the labels that the given model answers.
        after: The same of the repaired one.
        labels: int64 ``(N,)``: the true ones, if they are known.

    Raises:
        ValueError: No images, or tensors of different lengths.
    """
    if (
        before.shape != after.shape
        or not len(before)
        or (labels is not None and labels.shape != before.shape)
    ):
        raise ValueError("expected as many answers before as after, and one or more")
    rates = None if labels is None else (_share(before, labels), _share(after, labels))
    return RepairCost(rates, _share(before, after), len(before))


def _share(answers: Tensor, labels: Tensor) -> float:
    return float(torch.eq(answers, labels).double().mean())
