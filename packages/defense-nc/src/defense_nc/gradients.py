"""Did the gradients of a search lead anywhere? Counted while it runs."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A gradient has vanished if, to first order, moving every pixel through its whole range would close
# less than this share of the distance to the label.
_LEAST = 0.1


@dataclass
class GradientCount:
    """Of the images of a search that were not yet at their label: how many led nowhere."""

    images: int = 0
    vanished: int = 0

    def add(self, images: float, vanished: float) -> None:
        """Count those of another step."""
        self.images += int(images)
        self.vanished += int(vanished)

    def __add__(self, other: GradientCount) -> GradientCount:
        """Those of two searches."""
        return GradientCount(self.images + other.images, self.vanished + other.vanished)

    @property
    def share(self) -> float:
        """That have no gradient, in [0, 1]; 0 where every image was at its label."""
        return self.vanished / self.images if self.images else 0.0

    def state_dict(self) -> tuple[int, ...]:
        """All that changes: the arguments of another one."""
        return astuple(self)


def reached(logits: Tensor, goals: Tensor) -> Tensor:
    """Which rows of ``(N, K)`` have their label alone as the highest, bool ``(N,)``.

    Where outputs saturate, several share the highest, and the first of them would win.
    """
    high = logits.detach().topk(2).values
    return (logits.detach().argmax(1) == goals) & (high[:, 0] > high[:, 1])


def vanished(gradients: Tensor | None, logits: Tensor, goals: Tensor) -> Tensor:
    """Which images are not yet at their label while the gradient of their loss leads nowhere.

    Args:
        gradients: Of each image's cross-entropy, with respect to what is searched in, times the
            range of each number ``(N, ...)``: 1 for pixels. None if they do not depend on it.
        logits: ``(N, K)``.
        goals: int64 ``(N,)``.

    Returns:
        Bool ``(N,)``. A gradient with NaN or infinity leads nowhere, nor does one of equal logits.
    """
    logits = logits.detach().float()
    elsewhere = ~reached(logits, goals)
    if gradients is None:
        return elsewhere
    distance = logits.amax(1) - logits.gather(1, goals[:, None])[:, 0]
    reach = gradients.detach().float().flatten(1).abs().sum(1)
    leads = (reach > 0) & (reach >= _LEAST * distance) & reach.isfinite()
    return elsewhere & ~(leads & (distance > 0))


def count_images(model: nn.Module, images: Tensor, target: int) -> tuple[int, int]:
    """Of images ``(N, C, H, W)``: how many are not at the target, and have a vanished gradient."""
    goals = torch.full((len(images),), target, device=images.device)
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        logits = model(pixels).float()
        # The sum is there for models of thresholds, which depend on no pixel.
        loss = F.cross_entropy(logits, goals, reduction="sum") + 0 * pixels.sum()
        (grad,) = torch.autograd.grad(loss, pixels)
    elsewhere = ~reached(logits, goals)
    return int(elsewhere.sum()), int(vanished(grad, logits, goals).sum())
