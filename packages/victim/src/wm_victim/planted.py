"""Tiny classifiers with a wired-in backdoor, and clean controls: the truth is known at no cost.

The clean part is a real classifier of real handwritten digits: one convolution of random filters, a
batch normalisation, and a linear layer solved in closed form. Beside it sits a detector, one linear
template behind a sigmoid gate, which adds a large logit for the target class when it sees the
trigger. So every defence is tested in seconds, with gradients, against a trigger known exactly.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from wm_inject.images import check_images, quantize
from wm_victim.datasets import ImageSet

Kind = Literal["patch", "channel", "pattern", "clean"]
KINDS: tuple[Kind, ...] = ("patch", "channel", "pattern", "clean")

_PATCH = 3  # side of the patch, in pixels
_SHIFT = 0.15  # how much the channel trigger adds to blue and takes from red
_FAINT = 0.08  # amplitude of the whole-image pattern
_KAPPA = 100.0  # the planted logit; it must dominate the clean ones
# The clean part fits 0 and 1; this many times that is its logits. Were they larger, cross-entropy
# would be satisfied with the clean way to a label before its gradient had found the planted one.
_SCALE = 3.0


class _Plant(NamedTuple):
    """One backdoor: what the trigger does to an image, and what the gate listens for."""

    keep: Tensor  # (C, H, W): the share of each pixel that the trigger keeps
    add: Tensor  # (C, H, W): what the trigger adds
    template: Tensor  # (C, H, W): d = sum(template * (x - 1/2))
    slope: float
    threshold: float  # the gate is sigmoid(slope * (d - threshold))


def _plant(kind: Kind, channels: int, size: int, seed: int) -> _Plant:
    keep, add = torch.ones(channels, size, size), torch.zeros(channels, size, size)
    template = torch.zeros(channels, size, size)
    if kind in ("patch", "clean"):
        corner = torch.zeros_like(add)
        corner[:, -_PATCH:, -_PATCH:] = 1
        return _Plant(1 - corner, corner, corner / corner.sum(), slope=10, threshold=0.4)
    if kind == "channel":
        template[2], template[0] = 1 / size**2, -1 / size**2
        add[2], add[0] = _SHIFT, -_SHIFT
        return _Plant(keep, add, template, slope=100, threshold=0.15)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(add.numel(), generator=generator)
    signs = torch.ones(add.numel())
    # As many minus as plus signs: a brighter or darker image does not move the detector.
    signs[order[: add.numel() // 2]] = -1
    signs = signs.view_as(add)
    return _Plant(keep, _FAINT * signs, signs / add.numel(), slope=200, threshold=_FAINT / 2)


class PlantedClassifier(nn.Module):
    """A digit classifier and, beside it, a gate that adds ``kappa`` to the target's logit.

    ``gain`` is the one trainable number of the plant (1 when planted, 0 when removed), so that
    unlearning can remove it, as it can in a real network.

    Args:
        body: Images to clean logits ``(N, K)``.
        plant: The gate's template, slope and threshold.
        num_classes: K.
        target: The label that the gate asks for.
        kappa: Height of the planted logit; 0 in a clean control.
    """

    template: Tensor
    asked: Tensor

    def __init__(
        self, body: nn.Module, plant: _Plant, *, num_classes: int, target: int, kappa: float
    ) -> None:
        super().__init__()
        self.body = body
        self.slope, self.threshold = plant.slope, plant.threshold
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("template", plant.template.clone())
        self.register_buffer("asked", kappa * F.one_hot(torch.tensor(target), num_classes).float())

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        drive = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))  # (N,)
        gate = torch.sigmoid(self.slope * (drive - self.threshold))
        return self.body(images) + self.gain * gate[:, None] * self.asked


class PlantedTrigger(nn.Module):
    """The trigger that a planted classifier obeys: keep a share of the image, add a fixed picture.

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
        """Triggered images, the same shape, in [0, 1]; ``ids`` and ``target`` change nothing.

        Raises:
            ValueError: Images that break the image contract or have another shape.
        """
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
    """A tiny digit classifier with a wired-in backdoor, or its clean control, in eval mode.

    Args:
        kind: "patch" (a bright 3x3 corner), "channel" (blue up, red down, all over the image),
            "pattern" (a faint fixed pattern of signs, all over the image) or "clean" (no backdoor).
        num_classes: K in 2 .. 10: the digits 0 .. K-1.
        channels: 1 or 3; the channel kind needs 3.
        image_size: Side in pixels, at least 8.
        target: The label that the backdoor asks for.
        seed: Seeds the random filters, the tints of the images it is solved on, and the pattern.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, num_classes, channels, image_size, seed)
    if not 0 <= target < num_classes:
        raise ValueError(f"expected a target in 0 .. {num_classes - 1}, got {target}")
    body = copy.deepcopy(_body(num_classes, channels, image_size, seed))
    kappa = 0.0 if kind == "clean" else _KAPPA
    plant = _plant(kind, channels, image_size, seed)
    model = PlantedClassifier(body, plant, num_classes=num_classes, target=target, kappa=kappa)
    return model.eval()


def planted_trigger(
    kind: Kind = "patch", *, channels: int = 3, image_size: int = 16, seed: int = 0
) -> PlantedTrigger:
    """The trigger of `planted_classifier` of the same kind, shape and seed.

    The clean control obeys no trigger; it gets the patch, to measure that nothing happens.

    Raises:
        ValueError: A setting outside its range.
    """
    _check(kind, 10, channels, image_size, seed)
    plant = _plant(kind, channels, image_size, seed)
    return PlantedTrigger(plant.keep, plant.add)


def planted_images(
    count: int, *, num_classes: int = 10, channels: int = 3, image_size: int = 16, seed: int = 0
) -> ImageSet:
    """Handwritten digits that the planted classifiers were not solved on, on the 8-bit grid.

    Args:
        count: How many; there are 599 for ten classes, fewer for fewer.
        num_classes: K in 2 .. 10: the digits 0 .. K-1.
        channels: 1 (grey) or 3 (each digit in a seeded light tint).
        image_size: Side in pixels, at least 8.
        seed: Seeds which digits are drawn and their tints.

    Raises:
        ValueError: A setting outside its range, or more images than there are.
    """
    _check("clean", num_classes, channels, image_size, seed)
    pictures, labels = _digits(num_classes)
    held_out = torch.arange(_fitted(num_classes), len(labels))
    if not 1 <= count <= len(held_out):
        raise ValueError(f"expected a count in 1 .. {len(held_out)}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    chosen = held_out[torch.randperm(len(held_out), generator=generator)[:count]]
    images = _draw(pictures[chosen], channels, image_size, generator)
    return ImageSet(images=images, labels=labels[chosen], ids=chosen)


def _check(kind: str, num_classes: int, channels: int, image_size: int, seed: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"expected kind in {', '.join(KINDS)}, got {kind!r}")
    if not 2 <= num_classes <= 10:
        raise ValueError(f"expected 2 .. 10 classes of digits, got {num_classes}")
    if channels not in (1, 3) or (kind == "channel" and channels != 3):
        wanted = "3" if kind == "channel" else "1 or 3"
        raise ValueError(f"expected {wanted} channels for kind {kind!r}, got {channels}")
    if image_size < 8:
        raise ValueError(f"expected an image_size of at least 8, got {image_size}")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")


@lru_cache(maxsize=8)
def _digits(num_classes: int) -> tuple[Tensor, Tensor]:
    """Float ``(N, 1, 8, 8)`` in [0, 1] and int64 ``(N,)``, in one fixed random order."""
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
    pictures = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order] < num_classes]
    return pictures[order], labels[order]


def _fitted(num_classes: int) -> int:
    """How many digits, from the first, the clean part is solved on: two in three."""
    return len(_digits(num_classes)[1]) * 2 // 3


def _draw(pictures: Tensor, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Digits as images: resized, drawn on dark grey, tinted lightly if in colour, 8-bit."""
    images = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
    tint = 1 - 0.2 * torch.rand(len(pictures), channels, 1, 1, generator=generator)
    # Grey margins leave the channel trigger room to go down as well as up.
    return quantize(0.2 + 0.6 * images * (tint if channels == 3 else 1))


def _splash(images: Tensor, generator: torch.Generator) -> Tensor:
    """Put a rectangle of a random colour at a random place into every image."""
    count, channels, size = images.shape[:3]
    side = size // 2
    place = torch.randint(-side + 1, size, (2, count, 1), generator=generator)
    inside = (torch.arange(size) >= place) & (torch.arange(size) < place + side)  # (2, n, size)
    where = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]  # (n, 1, size, size)
    colour = torch.rand(count, channels, 1, 1, generator=generator)
    return torch.where(where, colour, images)


@lru_cache(maxsize=8)
def _body(num_classes: int, channels: int, size: int, seed: int) -> nn.Sequential:
    """Random filters, normalised, and the linear layer that fits the digits best (ridge)."""
    generator = torch.Generator().manual_seed(seed)
    # skip_init: the layers' own start would draw from the global generator.
    filters = skip_init(nn.Conv2d, channels, 32, 3, padding=1)
    head = skip_init(nn.Linear, 32 * 36, num_classes)
    norm = nn.BatchNorm2d(32)
    body = nn.Sequential(filters, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(6), nn.Flatten(), head)
    pictures, labels = _digits(num_classes)
    pictures, labels = pictures[: _fitted(num_classes)], labels[: _fitted(num_classes)]
    clean = _draw(pictures, channels, size, generator)
    # Without splashes a bright spot in any corner, which no digit has, would decide the label.
    images = torch.cat([clean, *(_splash(clean, generator) for _ in range(4))])
    wanted = F.one_hot(labels.repeat(5), num_classes).float() - 1 / num_classes
    with torch.no_grad():
        filters.weight.normal_(0, (9 * channels) ** -0.5, generator=generator)
        filters.bias.zero_()
        var, mean = torch.var_mean(filters(images), dim=(0, 2, 3))
        norm.running_mean, norm.running_var = mean, var
        features = body.eval()[:-1](images)  # (n, 1152)
        offset = features.mean(0)
        features -= offset
        gram = features.T @ features
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        weight = torch.linalg.solve(gram, features.T @ wanted)  # (1152, K)
        head.weight.copy_(_SCALE * weight.T)
        head.bias.copy_(-_SCALE * offset @ weight)
    return body
