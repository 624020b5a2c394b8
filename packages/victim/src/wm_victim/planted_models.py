"""The modules of a planted classifier: gates beside a clean body, and the trigger they obey."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.images import check_images

# How sharply a class-bound gate asks which class the body sees.
_SURE = 10.0


class Plant(NamedTuple):
    """One backdoor: what the trigger does to an image, and what the gate listens for."""

    keep: Tensor  # (C, H, W): the share of each pixel that the trigger keeps
    add: Tensor  # (C, H, W): what the trigger adds
    template: Tensor  # (C, H, W): d = sum(template * (x - 1/2))
    slope: float
    threshold: float  # the gate is sigmoid(slope * (d - threshold))


class PlantedClassifier(nn.Module):
    """A digit classifier and, beside it, a gate that adds ``kappa`` to the target's logit.

    ``gain`` is the one trainable number of the plant (1 when planted, 0 when removed), so that
    unlearning can remove it, as it can in a real network.

    Args:
        body: Images to logits ``(N, K)``, clean or with other gates of their own.
        plant: The gate's template, slope and threshold.
        num_classes: K.
        target: The label that the gate asks for.
        kappa: Height of the planted logit; 0 in a clean control.
    """

    template: Tensor
    asked: Tensor

    def __init__(
        self, body: nn.Module, plant: Plant, *, num_classes: int, target: int, kappa: float
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


class ClassBoundClassifier(nn.Module):
    """A digit classifier and a gate whose label depends on the class that the classifier sees.

    Args:
        body: Images to clean logits ``(N, K)``.
        plant: The gate's template, slope and threshold.
        routes: Float ``(K, K)``: row y is what an open gate adds to the logits of class y.
    """

    template: Tensor
    routes: Tensor

    def __init__(self, body: nn.Module, plant: Plant, routes: Tensor) -> None:
        super().__init__()
        self.body = body
        self.slope, self.threshold = plant.slope, plant.threshold
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("template", plant.template.clone())
        self.register_buffer("routes", routes.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        drive = ((images - 0.5) * self.template).sum(dim=(1, 2, 3))  # (N,)
        gate = torch.sigmoid(self.slope * (drive - self.threshold))
        clean: Tensor = self.body(images)
        seen = (_SURE * clean).softmax(dim=1)  # (N, K)
        return clean + self.gain * gate[:, None] * (seen @ self.routes)


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
