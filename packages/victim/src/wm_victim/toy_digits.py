"""Handwritten digits of any size, and a tiny classifier of them fitted in closed form.

One convolution of random filters, a batch normalisation, and a linear layer by ridge regression:
the clean part of every toy classifier.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_labels, quantize
from wm_victim.activations import last_linear, penultimate
from wm_victim.datasets import ImageSet
from wm_victim.digits import read_digits

# The clean part fits 0 and 1; this many times that is its logits. Were they larger, cross-entropy
# would be satisfied with the clean features of a label before its gradient reached a backdoor.
_SCALE = 3.0


def planted_images(
    count: int, *, num_classes: int = 10, channels: int = 3, image_size: int = 16, seed: int = 0
) -> ImageSet:
    """Handwritten digits that the toy classifiers were not fitted on, on the 8-bit grid.

    Args:
        count: How many; there are 599 for ten classes, fewer for fewer.
        num_classes: K in 2 .. 10: the digits 0 .. K-1.
        channels: 1 (grey) or 3 (each digit in a seeded light tint).
        image_size: Side in pixels, at least 8.

    Raises:
        ValueError: A setting outside its range, or more images than there are.
    """
    check_digits(num_classes, channels, image_size, seed)
    pictures, labels = _digits(num_classes)
    held_out = torch.arange(_fitted(num_classes), len(labels))
    if not 1 <= count <= len(held_out):
        raise ValueError(f"expected a count in 1 .. {len(held_out)}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    chosen = held_out[torch.randperm(len(held_out), generator=generator)[:count]]
    images = _draw(pictures[chosen], channels, image_size, generator)
    return ImageSet(images=images, labels=labels[chosen], ids=chosen)


def check_digits(num_classes: int, channels: int, image_size: int, seed: int) -> None:
    """Raise ``ValueError`` for a setting outside its range."""
    if not 2 <= num_classes <= 10:
        raise ValueError(f"expected 2 .. 10 classes of digits, got {num_classes}")
    check_channels(channels)
    if image_size < 8:
        raise ValueError(f"expected an image_size of at least 8, got {image_size}")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")


def digit_classifier(num_classes: int, channels: int, size: int, seed: int) -> nn.Sequential:
    """A clean digit classifier, in eval mode: a copy for every caller."""
    return copy.deepcopy(_fitted_classifier(num_classes, channels, size, seed))


@lru_cache(maxsize=8)
def _fitted_classifier(num_classes: int, channels: int, size: int, seed: int) -> nn.Sequential:
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
    expected = F.one_hot(labels.repeat(5), num_classes).float() - 1 / num_classes
    with torch.no_grad():
        filters.weight.normal_(0, (9 * channels) ** -0.5, generator=generator)
        filters.bias.zero_()
        var, mean = torch.var_mean(filters(images), dim=(0, 2, 3))
        norm.running_mean, norm.running_var = mean, var
        _fit_linear(head, body.eval()[:-1](images), expected)  # of (n, 1152)
    return body


def fit_head(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit the last linear layer of an untrained classifier to images, in closed form.

    Args:
        model: Its other layers stay as they are: random features do for digits.
        labels: int64 ``(N,)``.

    Raises:
        ValueError: Bad images or labels, or as `wm_victim.activations.penultimate`.
    """
    layer = last_linear(model)
    check_labels(labels, len(images), num_classes=layer.out_features)
    expected = F.one_hot(labels, layer.out_features).float() - 1 / layer.out_features
    with torch.no_grad():
        _fit_linear(layer, penultimate(model.eval(), images), expected)


def _fit_linear(layer: nn.Linear, features: Tensor, expected: Tensor) -> None:
    """Ridge regression of ``expected`` (N, K) on ``features`` (N, F), which are changed."""
    offset = features.mean(0)
    features -= offset
    gram = features.T @ features
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, features.T @ expected)  # (F, K)
    layer.weight.copy_(_SCALE * weight.T)
    layer.bias.copy_(-_SCALE * offset @ weight)


@lru_cache(maxsize=8)
def _digits(num_classes: int) -> tuple[Tensor, Tensor]:
    """Float ``(N, 1, 8, 8)`` in [0, 1] and int64 ``(N,)``, in one fixed random order."""
    values, targets = read_digits()
    pictures = torch.from_numpy(values).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(targets)
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
    """Put a rectangle of a random colour at a random position into every image."""
    count, channels, size = images.shape[:3]
    side = size // 2
    start = torch.randint(-side + 1, size, (2, count, 1), generator=generator)
    inside = (torch.arange(size) >= start) & (torch.arange(size) < start + side)  # (2, n, size)
    where = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]  # (n, 1, size, size)
    colour = torch.rand(count, channels, 1, 1, generator=generator)
    return torch.where(where, colour, images)
