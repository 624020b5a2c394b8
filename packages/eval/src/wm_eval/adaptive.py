"""An attacker who knows the detectors of an audit, and trains a victim that looks clean to them.

Detectors are worth what they find of those who do not know them only if it is also said what is
left against those who do. What is here measures that; it is no attack of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_reverse.detectors.picture_search import unit
from wm_inject.attacks.cotraining import check_keys, in_mode, victim_logits
from wm_inject.core.images import quantize
from wm_victim.activations import last_linear

_STATE = ("picture", "size", "batches")


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What the attacker does against the detectors.

    Args:
        size: Largest root mean square of a universal picture that the victim learns to resist, in
            units of [0, 1]; each picture has one of its own, from 0 up.
        share: Of a batch's images of other classes than the target, with the picture, in (0, 1].
        images: Of a batch that the picture is moved on.
        pull: How far, in units of the picture's size.
        batches: After so many the picture begins anew.
        length: Of each row of the last layer.
    """

    size: float = 160 / 255
    share: float = 0.5
    images: int = 64
    pull: float = 0.3
    batches: int = 40
    length: float = 1.5


class Evasion:
    """The part in training: universal pictures that lead to the target keep the true labels.

    So the backdoor's own trigger stays the only small picture that leads there. It acts on batches
    of a static attack; images that are labelled as the target, the poisoned ones among them, are
    left as they are.

    Source: ours; training against universal perturbations is that of Shafahi, Najibi, Xu,
        Dickerson, Davis and Goldstein, "Universal Adversarial Training" (AAAI 2020).
    """

    def __init__(self, target: int, settings: Adaptation) -> None:
        self.target, self.settings = target, settings
        self.picture = torch.zeros(())  # (C, H, W), of root mean square `size`
        self.size, self.batches = 0.0, 0

    def transform(
        self, images: Tensor, labels: Tensor, *, model: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The batch, some of whose images have the picture, after a step of the picture."""
        settings, others = self.settings, (labels != self.target).nonzero().flatten()
        if self.batches % settings.batches == 0:
            self.size = settings.size * float(torch.rand((), generator=generator))
            start = torch.randn(images.shape[1:], generator=generator)
            self.picture = self.size * unit(start.to(images.device))
        self.batches += 1
        if not len(others):
            return images, labels
        self._move(images[others[: settings.images]], model)
        count = max(1, int(settings.share * len(others)))
        order = torch.randperm(len(others), generator=generator)[:count]
        chosen, mixed = others[order.to(others.device)], images.clone()
        mixed[chosen] = quantize((images[chosen] + self.picture).clamp(0, 1))
        return mixed, labels

    def _move(self, images: Tensor, model: nn.Module) -> None:
        """The picture along the gradient that leads to the target, at its size."""
        inputs = (images + self.picture).clamp(0, 1).requires_grad_()
        goal = torch.full((len(images),), self.target, device=images.device)
        with in_mode(model, training=False), torch.enable_grad():
            loss = F.cross_entropy(victim_logits(model, inputs), goal, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, inputs)
        step = self.settings.pull * self.size * unit(gradient.sum(0))
        self.picture = self.size * unit(self.picture - step)

    def state_dict(self) -> dict[str, Any]:
        """The picture, its size and how many batches there were."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: The state of another attack.
        """
        check_keys(state, _STATE, name="an evasion")
        for name in _STATE:
            setattr(self, name, state[name])


def fix_head(model: nn.Module, *, length: float, seed: int) -> None:
    """Set the last layer to orthogonal rows of one length, in place, and keep training from it.

    No row can stand out then. The features learn to fit it.

    Args:
        model: A classifier that is not trained yet.
        length: Euclidean, of each row, above 0. With fewer features than labels rows are as
            orthogonal as they can be.
        seed: Of the rows.

    Raises:
        ValueError: A model without a linear layer at its end.
    """
    head = last_linear(model)
    rows = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    with torch.no_grad():
        head.weight.copy_(length * F.normalize(left @ right))
        if head.bias is not None:
            head.bias.zero_()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
