"""How close a reversed trigger comes to the true one, in numbers.

Figure 4 of Zheng, Hua and Zhang shows both residuals and gives no number. The size of a residual
alone says little: two changes can have the same size and nothing in common.
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


def compare_triggers(
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

    All is measured on 8-bit images, at least two. A cosine with a residual of zero counts as 0, and
    ``explained`` is 0 where the true trigger changes nothing.

    Args:
        ids: For a true trigger that depends on the image's number.
        target: For a true trigger that has one mark per label.
        seed: Which images are compared with which for ``cosine_shuffled``.

    Source: ours.
    """
    check_images(images)
    if len(images) < 2:
        raise ValueError(f"expected at least two images, got {len(images)}")
    targets = None if target is None else torch.full((len(images),), target, device=images.device)
    reversed_images, true_images = (
        _apply(trigger, images, ids, targets) for trigger in (reversed_trigger, true_trigger)
    )
    return compare_images(reversed_images, true_images, images, seed=seed)


def compare_images(
    reversed_images: Tensor, true_images: Tensor, images: Tensor, *, seed: int = 0
) -> Closeness:
    """As `compare_triggers`, for images that carry the two triggers already, on the 8-bit grid."""
    clean = quantize(images)
    between, before = psnr(reversed_images, true_images), psnr(clean, true_images)
    ours = (reversed_images - clean).flatten(1).double()
    truth = (true_images - clean).flatten(1).double()
    energy = float(truth.square().mean())
    missed = float((truth - ours).square().mean())
    other = _derangement(len(images), seed).to(images.device)
    return Closeness(
        psnr=float(between.double().mean()),
        psnr_clean=float(before.double().mean()),
        cosine=_cosine(ours, truth),
        cosine_shuffled=_cosine(ours, truth[other]) if len(images) > 1 else 0.0,
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
        arguments = {
            name: None if value is None else value[part]
            for name, value in (("ids", ids), ("target", target))
        }
        out.append(quantize(trigger(images[part], **arguments)))
    triggered = torch.cat(out)
    if triggered.shape != images.shape:
        raise ValueError(
            f"expected triggered images of shape {tuple(images.shape)}, "
            f"got {tuple(triggered.shape)}"
        )
    return triggered


def _cosine(one: Tensor, other: Tensor) -> float:
    """The mean cosine of rows; 0 where a row is zero."""
    lengths = one.norm(dim=1) * other.norm(dim=1)
    cosines = torch.where(lengths > 0, (one * other).sum(1) / lengths.clamp(min=1e-300), 0.0)
    return float(cosines.mean())


def _derangement(count: int, seed: int) -> Tensor:
    """A permutation without fixed points: a drawn order, shifted by one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shifted = torch.empty_like(order)
    shifted[order] = order.roll(1)
    return shifted
