"""Seeded draws, and a canvas with soft-edged shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

INK = (0.08, 0.06, 0.08)
_LUMA = (0.299, 0.587, 0.114)
Colour = Sequence[float] | Tensor


class Dice:
    """The draws of one picture: the same whatever its size."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float, high: float) -> float:
        """A number, uniform in [low, high)."""
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
        return low + (high - low) * float(drawn)

    def colour(self, low: float, high: float) -> tuple[float, float, float]:
        """Red, green and blue, each uniform in [low, high)."""
        return self(low, high), self(low, high), self(low, high)

    def octaves(self, size: int, *, rows: int | None = None) -> Tensor:
        """Smooth noise of every scale, near [-2, 2]: ``(1, size)`` or ``(size, size)``."""
        # A generator of its own, because larger pictures have more octaves.
        own = torch.Generator().manual_seed(int(self(0, 2**31)))
        field, grid, weight = torch.zeros(rows or size, size), 4, 1.0
        while grid <= max(size, 4):
            control = torch.randn(1, 1, min(grid, rows or grid), grid, generator=own)
            field += weight * F.interpolate(control, size=field.shape, mode="bilinear")[0, 0]
            grid, weight = 2 * grid, 0.7 * weight
        return field


class Canvas:
    """Pixels ``(3, size, size)`` to paint on; shapes are depths, positive inside, in sides."""

    def __init__(self, size: int, ground: Colour) -> None:
        self.size = size
        centres = (torch.arange(size) + 0.5) / size
        self.x, self.y = centres[None, :], centres[:, None]
        self.pixels = planes_of(ground).expand(3, size, size)

    def ellipse(self, x: float, y: float, wide: float, high: float | None = None) -> Tensor:
        """Round ``(x, y)``, with half axes ``wide`` and ``high``; a disc if one is given."""
        high = wide if high is None else high
        radius = torch.hypot((self.x - x) / wide, (self.y - y) / high)
        return (1 - radius) * min(wide, high)

    def box(self, x: float, y: float, wide: float, high: float) -> Tensor:
        """Upright, round ``(x, y)``, with half sides ``wide`` and ``high``."""
        return torch.minimum(wide - (self.x - x).abs(), high - (self.y - y).abs())

    def polygon(self, corners: Sequence[tuple[float, float]]) -> Tensor:
        """Convex; the depth is the distance to the nearest edge's line."""
        middle = [sum(values) / len(corners) for values in zip(*corners, strict=True)]
        depths = []
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            normal = (y0 - y1) / length, (x1 - x0) / length
            inward = (middle[0] - x0) * normal[0] + (middle[1] - y0) * normal[1]
            depth = (self.x - x0) * normal[0] + (self.y - y0) * normal[1]
            depths.append(depth if inward > 0 else -depth)
        return torch.stack(depths).amin(0)

    def star(self, points: int, turn: float, radius: float, waist: float) -> Tensor:
        """Round a centre in the middle; ``waist`` is how far its sides draw in."""
        x, y = self.x - 0.5, self.y - 0.5
        wave = 0.5 - 0.5 * torch.cos(points * torch.atan2(y, x) + turn)
        return radius * (1 - waist * wave) - torch.hypot(x, y)

    def paint(self, depth: Tensor, colour: Colour, *, outline: float = 0.0) -> None:
        """Fill a shape, inside an outline of ink if one is asked for."""
        if outline:
            self.paint(depth, INK)
        self.fade(colour, (depth - outline) * self.size + 0.5)

    def fade(self, colour: Colour, share: Tensor) -> None:
        """Go over to a colour by degrees: not at all where ``share`` is 0, wholly where it is 1."""
        self.pixels = self.pixels + (planes_of(colour) - self.pixels) * share.clamp(0, 1)

    def finish(self, channels: int) -> Tensor:
        """The picture in colour or grey: float32 ``(channels, size, size)`` in [0, 1]."""
        pixels = self.pixels.clamp(0, 1)
        if channels == 3:
            return pixels.contiguous()
        return (pixels * planes_of(_LUMA)).sum(0, keepdim=True).clamp(0, 1)


def planes_of(colour: Colour) -> Tensor:
    """A colour as ``(3, 1, 1)``; planes ``(3, H, W)`` stay what they are."""
    return colour if isinstance(colour, Tensor) else torch.tensor(colour).view(3, 1, 1)
