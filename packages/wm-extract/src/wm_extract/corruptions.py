"""Corruptions of an image on its way to the classifier: the anti-collapse operations.

Every corruption keeps shape and range, draws per image from a given CPU generator, and lets
gradients through (JPEG by a straight-through estimate): equation 6 of Spy-Watermark trains against
the code that the robustness tables measure with.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from wm_inject import check_images, to_float, to_pixels
from wm_inject.core.checks import check_choice


class Corruption(Protocol):
    """Images ``(N, C, H, W)`` in [0, 1] to the same shape and range."""

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image; ``generator`` is a CPU generator."""


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got}")


@dataclass(frozen=True)
class Identity:
    """No corruption."""

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        return check_images(images)


@dataclass(frozen=True)
class RandomMask:
    """Black out a ``share`` of every image, in [0, 1).

    Mode "pixel" drops pixels independently (the released code of Spy-Watermark); "block" erases
    one square at a random position ("erase the 1/4 areas", the paper's words).
    """

    mode: Literal["pixel", "block"] = "pixel"
    share: float = 0.25

    def __post_init__(self) -> None:
        _require(self.mode in ("pixel", "block"), "mode pixel or block", repr(self.mode))
        _require(0 <= self.share < 1, "a share in [0, 1)", self.share)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        n, _, h, w = check_images(images).shape
        if self.mode == "pixel":
            keep = torch.rand(n, 1, h, w, generator=generator) >= self.share
        else:
            bh, bw = round(h * math.sqrt(self.share)), round(w * math.sqrt(self.share))
            top = torch.randint(0, h - bh + 1, (n, 1, 1, 1), generator=generator)
            left = torch.randint(0, w - bw + 1, (n, 1, 1, 1), generator=generator)
            y, x = torch.arange(h).view(1, 1, h, 1), torch.arange(w).view(1, 1, 1, w)
            keep = ~((y >= top) & (y < top + bh) & (x >= left) & (x < left + bw))
        return images * keep.to(images)


def _affine(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return moved.clamp(0, 1)


@dataclass(frozen=True)
class Rotation:
    """Turn by a uniform angle in [-degrees, degrees] about the centre; empty corners are black.

    The paper gives no range; the released code has 60.
    """

    degrees: float = 60.0

    def __post_init__(self) -> None:
        _require(0 <= self.degrees <= 180, "degrees in [0, 180]", self.degrees)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        n = len(check_images(images))
        angle = torch.deg2rad(_uniform(n, -self.degrees, self.degrees, generator))
        zero, cos, sin = torch.zeros(n), angle.cos(), angle.sin()
        rows = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1)
        return _affine(images, rows.view(n, 2, 3))


@dataclass(frozen=True)
class GaussianNoise:
    """Add independent normal noise of standard deviation ``sigma``, in [0, 1] units, then clip.

    The released code has one grey level, which changes almost nothing; 8/255 is ours.
    """

    sigma: float = 8 / 255

    def __post_init__(self) -> None:
        _require(self.sigma >= 0, "sigma >= 0", self.sigma)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        noise = torch.randn(check_images(images).shape, generator=generator).to(images)
        return (images + self.sigma * noise).clamp(0, 1)


@dataclass(frozen=True)
class SaltPepper:
    """Set a share ``density`` of the pixels, in [0, 1], to black or white, half each."""

    density: float = 0.1

    def __post_init__(self) -> None:
        _require(0 <= self.density <= 1, "a density in [0, 1]", self.density)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        n, _, h, w = check_images(images).shape
        draw = torch.rand(n, 1, h, w, generator=generator).to(images)
        salted = torch.where(draw < self.density / 2, torch.ones_like(images), images)
        pepper = (draw >= self.density / 2) & (draw < self.density)
        return torch.where(pepper, torch.zeros_like(images), salted)


@dataclass(frozen=True)
class Rescale:
    """Resize width and height by factors in [low, high], then back to the input (bilinear)."""

    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high, "0 < low <= high", (self.low, self.high))

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        n, _, h, w = check_images(images).shape
        factors = _uniform(2 * n, self.low, self.high, generator).view(n, 2).tolist()
        out = []
        for image, (fy, fx) in zip(images.split(1), factors, strict=True):
            size = (max(1, round(h * fy)), max(1, round(w * fx)))
            there = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            out.append(F.interpolate(there, size=(h, w), mode="bilinear", align_corners=False))
        return torch.cat(out).clamp(0, 1)


@dataclass(frozen=True)
class Jpeg:
    """Compress as JPEG of ``quality`` 1 to 95 and decode; gradients pass straight through."""

    quality: int = 75

    def __post_init__(self) -> None:
        _require(1 <= self.quality <= 95, "a quality in 1 .. 95", self.quality)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        pixels = to_pixels(check_images(images).detach())
        for row in pixels:
            grey = row.shape[2] == 1
            stream = io.BytesIO()
            picture = Image.fromarray(row[:, :, 0] if grey else row)
            picture.save(stream, format="JPEG", quality=self.quality)
            row[...] = np.asarray(Image.open(stream)).reshape(row.shape)
        decoded = to_float(pixels).to(images)
        return images + (decoded - images).detach() if images.requires_grad else decoded


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of ``sigma`` pixels, with a kernel of three sigma to each side."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _require(self.sigma > 0, "sigma > 0", self.sigma)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        side = 2 * math.ceil(3 * self.sigma) + 1
        return gaussian_blur(check_images(images), [side, side], [self.sigma]).clamp(0, 1)


@dataclass(frozen=True)
class CropResize:
    """Crop a random window and resize it to the whole (bilinear).

    Args:
        share: Of the image's side that is left, in (0, 1].
        most: Where given, width and height are drawn apart, each from ``share`` to this share.
    """

    share: float = 0.8
    most: float | None = None

    def __post_init__(self) -> None:
        _require(0 < self.share <= 1, "a share in (0, 1]", self.share)
        if self.most is not None:
            _require(self.share <= self.most <= 1, f"most in [{self.share}, 1]", self.most)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        n = len(check_images(images))
        if self.most is None:
            share = torch.full((n, 2), self.share)
        else:
            share = _uniform(2 * n, self.share, self.most, generator).view(n, 2)
        room = (1 - share).unsqueeze(2)
        shift = _uniform(2 * n, -1, 1, generator).view(n, 2, 1) * room
        return _affine(images, torch.cat([share.diag_embed(), shift], dim=2))


@dataclass(frozen=True)
class Grey:
    """Replace all three colours by the luminance (ITU-R BT.601, as Pillow does)."""

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        if check_images(images).shape[1] == 1:
            return images
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1).to(images)
        return (images * weights).sum(1, keepdim=True).clamp(0, 1).expand_as(images)


@dataclass(frozen=True)
class RandomCorruption:
    """Equation 6 of Spy-Watermark: apply each operation in turn, to each image with probability p.

    Args:
        operations: s_1 .. s_n with their parameters o_k.
        probability: p_k, the same for all, in [0, 1].
    """

    operations: Sequence[Corruption]
    probability: float = 0.3

    def __post_init__(self) -> None:
        _require(0 <= self.probability <= 1, "a probability in [0, 1]", self.probability)

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Corrupt every image."""
        check_images(images)
        for operation in self.operations:
            chosen = torch.rand(len(images), generator=generator) < self.probability
            if chosen.any():
                rows = chosen.nonzero().flatten().to(images.device)
                changed = operation(images[rows], generator=generator)
                images = images.index_copy(0, rows, changed)
        return images


PAPER_CORRUPTIONS: Mapping[str, Corruption] = {
    "none": Identity(),
    "mask": RandomMask("pixel"),
    "mask-block": RandomMask("block"),
    "rotation": Rotation(),
    "noise": GaussianNoise(),
    "salt-pepper": SaltPepper(),
    "rescale": Rescale(),
}
EXTRA_CORRUPTIONS: Mapping[str, Corruption] = {
    "jpeg": Jpeg(),
    "blur": Blur(),
    "crop": CropResize(),
}


def named_corruption(name: str) -> Corruption:
    """A corruption of the tables by its name; ``ValueError`` for another."""
    known = {**PAPER_CORRUPTIONS, **EXTRA_CORRUPTIONS}
    check_choice("a corruption", name, known)
    return known[name]
