"""A classifier in two parts: images to features, and features to logits.

FeatureRE and BTI-DBF both search among the features of one layer. The published choice is the last
spatial map, whose mean over places is what the linear layer reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_victim.logits import Logits
from wm_victim.mnist_net import MnistNetBody
from wm_victim.mobilenet import MobileNetBody
from wm_victim.models import Classifier, Normalize
from wm_victim.resnet import ResNetBody
from wm_victim.vgg import VggBody

Part = Callable[[Tensor], Tensor]


class FeatureSplit(NamedTuple):
    """``head(features(images))`` is the model's answer; both parts use the model's own weights."""

    features: Part  # images (N, C, H, W) in [0, 1] -> (N, ...)
    head: Part  # features (N, ...) -> logits (N, K)


def split_at_last_map(model: nn.Module) -> FeatureSplit:
    """Split a classifier behind its last spatial map.

    The parts follow the model: its weights, its mode and its device.

    Args:
        model: A `wm_victim.Classifier`, or any module that has ``features`` and ``head``. A
            classifier whose body is not one of ours is split where its head begins.

    Source: FeatureRE (Wang 2022) and BTI-DBF (Xu 2024), whose networks are cut in the same place.
    """
    if isinstance(model, Logits):
        inner, copied = split_at_last_map(model.model), model.copy
        return FeatureSplit(
            lambda images: inner.features(images.clone() if copied else images),
            lambda features: model.convert(inner.head(features)),
        )
    if isinstance(model, Classifier):
        parts = _cut(model.body)
        if parts is not None:
            trunk, pool = parts
            return FeatureSplit(
                lambda images: trunk(model.normalize(images)), lambda maps: model.head(pool(maps))
            )
    features, head = getattr(model, "features", None), getattr(model, "head", None)
    if not callable(features) or not callable(head):
        raise ValueError(
            "expected a wm_victim Classifier, or a model with features and head, "
            f"got {type(model).__name__}"
        )
    return FeatureSplit(features, head)


def check_split(split: FeatureSplit, model: nn.Module, images: Tensor) -> None:
    """Raise ``ValueError`` unless the two parts give the model's logits for these images."""
    with torch.no_grad():
        composed, logits = split.head(split.features(images)), model(images)
    # Another order of the same sums: equal but for rounding.
    if composed.shape != logits.shape or not torch.allclose(composed, logits, rtol=1e-3, atol=1e-3):
        raise ValueError("expected head(features(images)) to be the model's logits, got others")


def image_scale(model: nn.Module, images: Tensor) -> Tensor:
    """The unit of a change of an image, ``(1, C, 1, 1)``: one deviation of the normalisation.

    Published bounds hold for normalised images. Without a `Normalize` it is the deviation of
    ``images``.
    """
    model = model.model if isinstance(model, Logits) else model
    normalize = getattr(model, "normalize", None)
    if isinstance(normalize, Normalize):
        return normalize.std
    return images.std(dim=(0, 2, 3), keepdim=True).clamp(min=1 / 255)


def image_change(generated: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Mean squared change in units of ``scale``: the MSE between normalised images."""
    return F.mse_loss(generated / scale, images / scale)


def _cut(body: nn.Module) -> tuple[Part, Part] | None:
    """The body up to its last map, and from there to the vector that the head reads."""
    if isinstance(body, ResNetBody):
        return (lambda x: body.blocks(body.stem(x))), _mean
    if isinstance(body, VggBody):
        return (lambda x: body.layers(_padded(x, body.padding))), _mean
    if isinstance(body, MobileNetBody):
        return body.layers, _mean
    if isinstance(body, MnistNetBody):
        kinds = [type(layer) for layer in body.layers]
        flatten = kinds.index(nn.Flatten)
        return body.layers[:flatten], body.layers[flatten:]
    return None


def _mean(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def _padded(images: Tensor, padding: list[int]) -> Tensor:
    return F.pad(images, padding, mode="replicate") if any(padding) else images
