"""Are a model's gradients those of its answers? A step along them has to raise the margin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST = 0.25  # of the rise that the gradients promise
_STEPS = (1 / 255, 4 / 255, 16 / 255)  # largest change of a pixel
_IMAGES = 32


def margin_rise(module: nn.Module, images: Tensor) -> float:
    """How far margins rise with a step along their gradients, as a share of what these promise.

    About 1 for a model whose gradients are its own, about 0 where they are masked or borrowed, as
    behind thresholds and rounding. A margin is the distance of the highest logit to the next.

    Args:
        images: In [0, 1]; the first 32 are used.

    Returns:
        The median over the images, for the step size where it is largest.
    """
    images = images[:_IMAGES]
    pixels = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = module(pixels)
        answers = logits.detach().argmax(1)
        (gradient,) = torch.autograd.grad(_margins(logits, answers).sum(), pixels)
    # No pixel leaves its range: networks may clip there.
    leaves = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
    direction = gradient.masked_fill(leaves, 0)
    direction = direction / direction.flatten(1).abs().amax(1).clamp_min(1e-30).view(-1, 1, 1, 1)
    promised = (gradient * direction).flatten(1).sum(1)
    before = _margins(logits.detach(), answers)
    shares = []
    for step in _STEPS:
        with torch.no_grad():
            stepped = module((images + step * direction).clamp(0, 1))
        rise = _margins(stepped, answers) - before
        shares.append(torch.where(promised > 0, rise / (step * promised), 0).median())
    return float(torch.stack(shares).max())


def _margins(logits: Tensor, answers: Tensor) -> Tensor:
    """The logit of each answer, less the highest other one ``(N,)``."""
    own = logits.gather(1, answers[:, None])[:, 0]
    return own - logits.scatter(1, answers[:, None], -torch.inf).amax(1)
