"""Tiny digit classifiers with a known backdoor, and clean controls, built without training.

The clean part is a real classifier of handwritten digits. Beside it a gate, one linear template
behind a sigmoid, adds a large logit for the target class when it sees the trigger. So a defence is
tested in seconds, with gradients, against a trigger known exactly. Four further kinds are cases
outside what such defences assume.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from wm_inject.core.checks import check_choice
from wm_inject.core.images import check_images
from wm_victim.toy_digits import check_digits, digit_classifier
from wm_victim.toy_digits import planted_images as planted_images

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
KINDS: tuple[Kind, ...] = get_args(Kind)[:4]
LIMITS: tuple[Kind, ...] = get_args(Kind)[4:]

_PATCH = 3  # side of the patch, in pixels
_SHIFT = 0.15  # how much the channel trigger adds to blue and takes from red
_AMPLITUDE = 0.08  # of a whole-image pattern
_LOGIT = 100.0  # the added logit; it must dominate the clean ones
_SHARPNESS = 10.0  # of a gate that depends on the class that the clean part predicts
_SEVERAL = 3  # targets of the kind "several", each with a patch in a corner of its own
_SEED_STEP = 1_000_000  # between the seeds of the patterns of the kind "every-label"


class Backdoor(NamedTuple):
    """What a trigger does to an image, and the gate that it opens."""

    keep: Tensor  # (C, H, W): the share of each pixel that the trigger keeps
    add: Tensor  # (C, H, W): what the trigger adds
    template: Tensor  # (C, H, W): d = sum(template * (x - 1/2))
    slope: float
    threshold: float  # the gate is sigmoid(slope * (d - threshold))


class GatedClassifier(nn.Module):
    """A classifier and, beside it, a gate that adds to its logits.

    ``gain`` is the one trainable number of the backdoor (1 when planted, 0 when removed), so that
    unlearning can remove it, as in a real network.

    Args:
        body: Images to logits, clean or with other gates.
        backdoor: The gate's template, slope and threshold.
        added: What an open gate adds: ``(K,)``, or ``(K, K)`` with a row for each predicted class.
    """

    template: Tensor
    added: Tensor

    def __init__(self, body: nn.Module, backdoor: Backdoor, added: Tensor) -> None:
        super().__init__()
        self.body = body
        self.slope, self.threshold = backdoor.slope, backdoor.threshold
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("template", backdoor.template.clone())
        self.register_buffer("added", added.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``(N, K)``."""
        score = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))  # (N,)
        gate = torch.sigmoid(self.slope * (score - self.threshold))
        logits: Tensor = self.body(images)
        added = self.added
        if added.ndim == 2:
            added = (_SHARPNESS * logits).softmax(dim=1) @ added  # (N, K)
        return logits + self.gain * gate[:, None] * added


class PlantedTrigger(nn.Module):
    """The trigger of a gated classifier: keep a share of the image, add a fixed picture.

    Args:
        keep: ``(C, H, W)`` in [0, 1].
        add: ``(C, H, W)`` in [-1, 1].
    """

    keep: Tensor
    add: Tensor

    def __init__(self, keep: Tensor, add: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep.clone())
        self.register_buffer("add", add.clone())

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Triggered images; ``ids`` and ``target`` are ignored."""
        height, width = self.add.shape[1:]
        check_images(images, channels=self.add.shape[0], size=(height, width))
        return (images * self.keep + self.add).clamp(0, 1)


def planted_classifier(
    kind: Kind = "patch",
    *,
    num_classes: int = 10,
    channels: int = 3,
    image_size: int = 16,
    target: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A tiny digit classifier with a planted backdoor, or its clean control, in eval mode.

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
            label ``target + i`` modulo K. "all-to-all" ignores it.
        seed: Of the random filters, the tints of the images they are fitted on, and the patterns.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, num_classes, channels, image_size, seed)
    if not 0 <= target < num_classes:
        raise ValueError(f"expected a target in 0 .. {num_classes - 1}, got {target}")
    model: nn.Module = digit_classifier(num_classes, channels, image_size, seed)
    logits = _LOGIT * torch.eye(num_classes)
    if kind == "clean":
        added = [0 * logits[target]]
    elif kind == "all-to-all":
        added = [logits.roll(1, dims=1)]  # row y asks for y + 1
    elif kind == "source-specific":
        rows = torch.zeros_like(logits)
        rows[(target + 1) % num_classes] = logits[target]
        added = [rows]
    else:
        count = trigger_count(kind, num_classes)
        added = [logits[(target + which) % num_classes] for which in range(count)]
    for which, logit in enumerate(added):
        model = GatedClassifier(model, _backdoor(kind, channels, image_size, seed, which), logit)
    return model.eval()


def planted_trigger(
    kind: Kind = "patch",
    *,
    channels: int = 3,
    image_size: int = 16,
    seed: int = 0,
    which: int = 0,
) -> PlantedTrigger:
    """The trigger of `planted_classifier` with the same settings.

    The clean control has no trigger; it gets the patch, to measure that nothing happens. Of several
    triggers, ``which`` is the number of this one, below `trigger_count`.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, 10, channels, image_size, seed)
    if not 0 <= which < trigger_count(kind, 10):
        raise ValueError(f"expected which in 0 .. {trigger_count(kind, 10) - 1}, got {which}")
    backdoor = _backdoor(kind, channels, image_size, seed, which)
    return PlantedTrigger(backdoor.keep, backdoor.add)


def trigger_count(kind: Kind, num_classes: int = 10) -> int:
    """How many triggers, each with a target of its own, a kind has among K classes."""
    return {"several": _SEVERAL, "every-label": num_classes}.get(kind, 1)


def _backdoor(kind: Kind, channels: int, size: int, seed: int, which: int) -> Backdoor:
    keep, add = torch.ones(channels, size, size), torch.zeros(channels, size, size)
    template = torch.zeros(channels, size, size)
    if kind == "channel":
        template[2], template[0] = 1 / size**2, -1 / size**2
        add[2], add[0] = _SHIFT, -_SHIFT
        return Backdoor(keep, add, template, slope=100, threshold=0.15)
    if kind in ("pattern", "every-label"):
        signs = _signs(add, seed + _SEED_STEP * which)
        template = signs / add.numel()
        return Backdoor(keep, _AMPLITUDE * signs, template, slope=200, threshold=_AMPLITUDE / 2)
    corner = torch.zeros_like(add)
    corner[:, -_PATCH:, -_PATCH:] = 1
    corner = corner.rot90(which, dims=(1, 2))  # each trigger in a corner of its own
    return Backdoor(1 - corner, corner, corner / corner.sum(), slope=10, threshold=0.4)


def _signs(like: Tensor, seed: int) -> Tensor:
    """A fixed pattern of plus and minus one."""
    order = torch.randperm(like.numel(), generator=torch.Generator().manual_seed(seed))
    signs = torch.ones(like.numel())
    # As many minus as plus signs: a brighter or darker image does not change the gate.
    signs[order[: like.numel() // 2]] = -1
    return signs.view_as(like)


def _check(kind: str, num_classes: int, channels: int, image_size: int, seed: int) -> None:
    check_choice("kind", kind, get_args(Kind))
    check_digits(num_classes, channels, image_size, seed)
    if kind == "channel" and channels != 3:
        raise ValueError(f"expected 3 channels for kind {kind!r}, got {channels}")
    if kind == "several" and num_classes < _SEVERAL:
        raise ValueError(f"expected at least {_SEVERAL} classes for kind {kind!r}")
