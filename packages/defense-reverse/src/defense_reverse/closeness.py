"""How close a reversed image comes to the true poisoned one, in numbers.

Zheng, Hua and Zhang show both residuals side by side in their figure 4 and give no figure for how
alike they are. A small residual alone says little: two changes can have the same size and nothing
in common.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wm_inject import psnr
from wm_inject.core.images import check_images, quantize
from wm_inject.core.plan import Trigger

_CHUNK = 256


class Closeness(NamedTuple):
    """Two triggers on the same images, as means over the images. Residual: output minus input."""

    psnr: float  # dB, between the reversed and the true poisoned image, at most 100
    psnr_clean: float  # dB, between the clean and the true poisoned image: what a copy would get
    cosine: float  # of the two residuals of one image, in [-1, 1]
    cosine_shuffled: float  # of residuals of two different images: what they share for any image
    energy_reversed: float  # mean square of the reversed residual
    energy_true: float  # mean square of the true residual
    explained: float  # share of the true residual's energy that the reversed one accounts for, <= 1


def closeness(
    reversed_trigger: Trigger,
    true_trigger: Trigger,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    target: int | None = None,
    seed: int = 0,
) -> Closeness:
    """Compare what a reversed trigger does to images with what the attacker's trigger does to them.

    The cosine tells whether the change is the same whatever its size; beside the cosine with other
    images' changes (``cosine_shuffled``) it tells whether the change follows the image. The PSNR by
    itself flatters, since both images lie near the clean one: only above ``psnr_clean`` is the
    reversed image closer than no change at all.

    Args:
        reversed_trigger: Such as a `ReversedTrigger`.
        true_trigger: The attacker's.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], N >= 2.
        ids: int64 ``(N,)``, for a true trigger that depends on the image's number.
        target: The label to ask of a true trigger that has one mark per label.
        seed: Which images are compared with which for ``cosine_shuffled``.

    Returns:
        The figures, on 8-bit images. A cosine with a residual of zero counts as 0, and
        ``explained`` is 0 where the true trigger changes nothing.

    Raises:
        ValueError: Bad images, fewer than two, or triggers that give other shapes.

    Source: ours.
    """
    check_images(images)
    if len(images) < 2:
        raise ValueError(f"expected at least two images, got {len(images)}")
    asked = None if target is None else torch.full((len(images),), target, device=images.device)
    found = _apply(reversed_trigger, images, ids, asked)
    truth = _apply(true_trigger, images, ids, asked)
    return image_closeness(found, truth, images, seed=seed)


def image_closeness(found: Tensor, truth: Tensor, images: Tensor, *, seed: int = 0) -> Closeness:
    """The figures of `closeness`, for images that carry the two triggers already.

    Args:
        found: The images with the reversed trigger, on the 8-bit grid.
        truth: The images with the attacker's trigger, likewise.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        seed: Which images are compared with which for ``cosine_shuffled``; 0 if N is 1.

    Raises:
        ValueError: Bad images, or of other shapes.
    """
    clean = quantize(images)
    between, before = psnr(found, truth), psnr(clean, truth)  # these refuse what is no pair
    ours, theirs = (found - clean).flatten(1).double(), (truth - clean).flatten(1).double()
    energy = float(theirs.square().mean())
    missed = float((theirs - ours).square().mean())
    other = _derangement(len(images), seed).to(images.device)
    return Closeness(
        psnr=float(between.double().mean()),
        psnr_clean=float(before.double().mean()),
        cosine=_cosine(ours, theirs),
        cosine_shuffled=_cosine(ours, theirs[other]) if len(images) > 1 else 0.0,
        energy_reversed=float(ours.square().mean()),
        energy_true=energy,
        explained=1 - missed / energy if energy > 0 else 0.0,
    )


@torch.no_grad()
def _apply(trigger: Trigger, images: Tensor, ids: Tensor | None, target: Tensor | None) -> Tensor:
    """The trigger's 8-bit images."""
    out = []
    for begin in range(0, len(images), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        few = {
            name: None if value is None else value[part]
            for name, value in (("ids", ids), ("target", target))
        }
        out.append(quantize(trigger(images[part], **few)))
    whole = torch.cat(out)
    if whole.shape != images.shape:
        raise ValueError(
            f"expected a trigger that gives shape {tuple(images.shape)}, got {tuple(whole.shape)}"
        )
    return whole


def _cosine(one: Tensor, other: Tensor) -> float:
    """The mean cosine of rows; 0 where a row is zero."""
    lengths = one.norm(dim=1) * other.norm(dim=1)
    cosines = torch.where(lengths > 0, (one * other).sum(1) / lengths.clamp(min=1e-300), 0.0)
    return float(cosines.mean())


def _derangement(count: int, seed: int) -> Tensor:
    """An order in which nothing keeps its place: a drawn one, turned by one."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(drawn)
    moved[drawn] = drawn.roll(1)
    return moved


__all__ = ["Closeness", "closeness", "image_closeness"]
