"""Tiny classifiers with a wired-in backdoor, and clean controls: the truth is known at no cost.

The clean part is a real classifier of real handwritten digits. Beside it sits a detector, one
linear template behind a sigmoid gate, which adds a large logit for the target class when it sees
the trigger. So every defence is tested in seconds, with gradients, against a trigger known exactly;
four kinds more are limits of such defences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from wm_victim.planted_digits import check_digits, digit_body, planted_images
from wm_victim.planted_models import ClassBoundClassifier, Plant, PlantedClassifier, PlantedTrigger

__all__ = [
    "KINDS",
    "LIMITS",
    "Kind",
    "planted_classifier",
    "planted_images",
    "planted_trigger",
    "trigger_count",
]

Kind = Literal[
    "patch",
    "channel",
    "pattern",
    "clean",
    "several",
    "every-label",
    "all-to-all",
    "source-specific",
]
KINDS: tuple[Kind, ...] = ("patch", "channel", "pattern", "clean")
LIMITS: tuple[Kind, ...] = ("several", "every-label", "all-to-all", "source-specific")

_PATCH = 3  # side of the patch, in pixels
_SHIFT = 0.15  # how much the channel trigger adds to blue and takes from red
_FAINT = 0.08  # amplitude of a whole-image pattern
_KAPPA = 100.0  # the planted logit; it must dominate the clean ones
_SEVERAL = 3  # targets of the kind "several", each with a patch in a corner of its own
_NEXT = 1_000_000  # between the seeds of the patterns of the kind "every-label"


def planted_classifier(
    kind: Kind = "patch",
    *,
    num_classes: int = 10,
    channels: int = 3,
    image_size: int = 16,
    target: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A tiny digit classifier with a wired-in backdoor, or its clean control, in eval mode.

    Args:
        kind: "patch" (a bright 3x3 corner), "channel" (blue up, red down, all over the image),
            "pattern" (a faint fixed pattern of signs, all over the image) or "clean" (no backdoor).
            Limits: "several" (patches in three corners, each with a target), "every-label" (a
            pattern for each label), "all-to-all" (a patch sends class y to y + 1) and
            "source-specific" (a patch sends the class after the target, and no other, to it).
        num_classes: K in 2 .. 10: the digits 0 .. K-1; "several" needs three.
        channels: 1 or 3; the channel kind needs 3.
        image_size: Side in pixels, at least 8.
        target: The label that the backdoor asks for; of several triggers number i asks for the
            label ``target + i`` modulo K. It changes nothing in the kind "all-to-all".
        seed: Seeds the random filters, the tints of the images it is solved on, and the patterns.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, num_classes, channels, image_size, seed)
    if not 0 <= target < num_classes:
        raise ValueError(f"expected a target in 0 .. {num_classes - 1}, got {target}")
    model: nn.Module = digit_body(num_classes, channels, image_size, seed)
    if kind in ("all-to-all", "source-specific"):
        routes = _KAPPA * torch.eye(num_classes).roll(1, dims=1)  # row y asks for y + 1
        if kind == "source-specific":
            source = (target + 1) % num_classes
            routes = torch.zeros_like(routes)
            routes[source, target] = _KAPPA
        return ClassBoundClassifier(
            model, _plant(kind, channels, image_size, seed, 0), routes
        ).eval()
    kappa = 0.0 if kind == "clean" else _KAPPA
    for which in range(trigger_count(kind, num_classes)):
        plant = _plant(kind, channels, image_size, seed, which)
        asked = (target + which) % num_classes
        model = PlantedClassifier(model, plant, num_classes=num_classes, target=asked, kappa=kappa)
    return model.eval()


def planted_trigger(
    kind: Kind = "patch",
    *,
    channels: int = 3,
    image_size: int = 16,
    seed: int = 0,
    which: int = 0,
) -> PlantedTrigger:
    """The trigger of `planted_classifier` of the same kind, shape and seed.

    The clean control obeys no trigger; it gets the patch, to measure that nothing happens.

    Args:
        kind: As for the classifier.
        channels: As for the classifier.
        image_size: As for the classifier.
        seed: As for the classifier.
        which: Of several triggers, the number of this one: below `trigger_count`.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, 10, channels, image_size, seed)
    if not 0 <= which < trigger_count(kind, 10):
        raise ValueError(f"expected which in 0 .. {trigger_count(kind, 10) - 1}, got {which}")
    plant = _plant(kind, channels, image_size, seed, which)
    return PlantedTrigger(plant.keep, plant.add)


def trigger_count(kind: Kind, num_classes: int = 10) -> int:
    """How many triggers, each with a target of its own, a kind has among K classes."""
    return {"several": _SEVERAL, "every-label": num_classes}.get(kind, 1)


def _plant(kind: Kind, channels: int, size: int, seed: int, which: int) -> Plant:
    keep, add = torch.ones(channels, size, size), torch.zeros(channels, size, size)
    template = torch.zeros(channels, size, size)
    if kind == "channel":
        template[2], template[0] = 1 / size**2, -1 / size**2
        add[2], add[0] = _SHIFT, -_SHIFT
        return Plant(keep, add, template, slope=100, threshold=0.15)
    if kind in ("pattern", "every-label"):
        signs = _signs(add, seed + _NEXT * which)
        template = signs / add.numel()
        return Plant(keep, _FAINT * signs, template, slope=200, threshold=_FAINT / 2)
    corner = torch.zeros_like(add)
    corner[:, -_PATCH:, -_PATCH:] = 1
    corner = corner.rot90(which, dims=(1, 2))  # each trigger in a corner of its own
    return Plant(1 - corner, corner, corner / corner.sum(), slope=10, threshold=0.4)


def _signs(like: Tensor, seed: int) -> Tensor:
    """A fixed pattern of plus and minus one."""
    order = torch.randperm(like.numel(), generator=torch.Generator().manual_seed(seed))
    signs = torch.ones(like.numel())
    # As many minus as plus signs: a brighter or darker image does not move the detector.
    signs[order[: like.numel() // 2]] = -1
    return signs.view_as(like)


def _check(kind: str, num_classes: int, channels: int, image_size: int, seed: int) -> None:
    if kind not in (*KINDS, *LIMITS):
        raise ValueError(f"expected kind in {', '.join((*KINDS, *LIMITS))}, got {kind!r}")
    check_digits(num_classes, channels, image_size, seed)
    if kind == "channel" and channels != 3:
        raise ValueError(f"expected 3 channels for kind {kind!r}, got {channels}")
    if kind == "several" and num_classes < _SEVERAL:
        raise ValueError(f"expected at least {_SEVERAL} classes for kind {kind!r}")
