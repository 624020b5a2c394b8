"""Feature-shift tuning: fine-tune with a fresh head that is held away from the suspect's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.mitigations import (
    Closure,
    Sgd,
    check_repair,
    cross_entropy,
    fine_tune,
    plain_step,
    sgd_preset,
)
from defense_nc.protocols import Repaired
from wm_inject.core.plan import Trigger
from wm_victim.activations import last_linear


@dataclass(frozen=True, kw_only=True)
class FeatureShiftTuning:
    """Draw the head anew, and fine-tune all layers so that it stays unlike the suspect's.

    With W the head and W0 the suspect's, the loss is cross-entropy + ``shift`` * <W, W0>, and after
    every step W has the norm of W0. Features that a backdoor relies on lose their reader and move.

    Args:
        sgd: How it is fine-tuned.
        shift: Weight of the inner product, at least 0. With 0 the head is drawn anew, and no more.

    Source: Min, Qin, Shen and Cheng, "Towards Stable Backdoor Purification through Feature Shift
        Tuning" (NeurIPS 2023) and its released code.
    """

    name: ClassVar[str] = "fst"
    sgd: Sgd = Sgd(lr=0.01)
    shift: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.shift < float("inf"):
            raise ValueError(f"expected shift >= 0, got {self.shift}")

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> FeatureShiftTuning:
        """Settings by name, with changes.

        "paper" is ten passes over 1,000 images of CIFAR-10 in batches of 128. "fast" takes 200
        batches of 32, and "batch-128" as many of 128, for accurate networks (both ours).
        "fresh-head" is "fast" without the shift.
        """
        return sgd_preset(cls, PRESETS, name, **changes)

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Fine-tune a copy; the log holds the loss of each tenth of the steps.

        Raises:
            ValueError: A model without a linear layer at its end.
            DivergedError: The loss became NaN or infinite.
        """
        check_repair(model, images, labels)
        tuned = copy.deepcopy(model)
        head = last_linear(tuned)
        suspect = head.weight.detach().clone()
        _draw(head, seed)
        error = cross_entropy(tuned, self.sgd)

        def loss(batch: Tensor, batch_labels: Tensor) -> Tensor:
            return error(batch, batch_labels) + self.shift * (head.weight * suspect).sum()

        def update(optimizer: torch.optim.Optimizer, closure: Closure) -> Tensor:
            value = plain_step(optimizer, closure)
            with torch.no_grad():
                head.weight.mul_(suspect.norm() / head.weight.norm())
            return value

        losses = fine_tune(
            *(tuned, images, labels),
            sgd=self.sgd,
            seed=seed,
            loss=loss,
            update=update,
            desc="feature-shift tuning",
            progress=progress,
        )
        return Repaired(tuned, {"steps": self.sgd.steps, "losses": losses})


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "batch-128": {"batch_size": 128},
    "paper": {"steps": 80, "batch_size": 128},
    "fresh-head": {"shift": 0.0},
}


def _draw(head: nn.Linear, seed: int) -> None:
    """Weights and bias uniform in +- 1 / sqrt(inputs), on the CPU first: the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    bound = head.in_features**-0.5
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                fresh = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(fresh)
