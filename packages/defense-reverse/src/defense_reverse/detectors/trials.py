"""Images that a change is tried on: how much it leaves of the ways to all labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.scan_inputs import ScanInputs
from wm_victim.inference import images_a_pass


class Moved(NamedTuple):
    """What a change does for every label."""

    gaps: Tensor  # float64 (K,): what it leaves of the way to the label, 1 if it does nothing
    rates: Tensor  # float64 (K,): share of the images that it sends there


class Trial(NamedTuple):
    """Images to try changes on."""

    model: nn.Module
    images: Tensor
    free: Tensor  # bool (N, K): the label is neither the image's nor the model's answer to it
    ways: Tensor  # float64 (K,): the mean gap of these images as they are

    @classmethod
    def of(cls, inputs: ScanInputs, indices: Tensor) -> Trial:
        """Those of the defender's images that the indices name."""
        images, labels = inputs.images[indices], inputs.labels[indices]
        gaps = _gaps(inputs.model, images)
        every = torch.arange(inputs.num_classes, device=images.device)
        free = (labels[:, None] != every) & (gaps > 0)
        return cls(inputs.model, images, free, _mean(gaps, free).clamp(min=1e-12))

    def after(self, change: Callable[[Tensor], Tensor]) -> Moved:
        """What is left of the ways to all labels, and the share of images at their end."""
        gaps = _gaps(self.model, change(self.images))
        left = _mean(gaps, self.free) / self.ways
        # No image could be moved to a label that all of these have: nothing is known of it.
        left[~self.free.any(0).cpu()] = 1.0
        return Moved(left, _mean((gaps == 0).double(), self.free))


def _gaps(model: nn.Module, images: Tensor) -> Tensor:
    """How far each label's logit is below the highest, float64 ``(N, K)``."""
    at_once = images_a_pass(images, images.device, most=256)
    logits = torch.cat([model(part) for part in images.split(at_once)]).double()
    return logits.amax(1, keepdim=True) - logits


def _mean(values: Tensor, free: Tensor) -> Tensor:
    """The mean over the images that are free, ``(K,)``."""
    return ((values * free).sum(0) / free.sum(0).clamp(min=1)).cpu()


def scores_of(gaps: Tensor, rates: Tensor, *, works: float, tested: int) -> Tensor:
    """The scores of all labels, float64 ``(K,)``: gaps above zero, what does not work set apart.

    Args:
        gaps: As `Moved.gaps`, and so are ``rates``.
        works: Success rate of a trigger: what moves some images only, as a square that hides the
            object does, is none, and has 1 more.
        tested: Images that both are of; half an image's share is added, so that a logarithm is
            defined.
    """
    return gaps + 0.5 / tested + (rates < works).double()
