"""Pictures drawn from a seed: a cartoon, a scene and a logo, at any size, without any file.

Attacks that blend in, reflect or hide a picture need one, and the pictures that the field uses
cannot be shipped. These are drawn from distances in units of the picture's side with soft edges
one pixel wide, so one seed shows the same picture at every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wm_inject.images import check_images, check_side, load_image, to_float

_INK = (0.08, 0.06, 0.08)
_LUMA = (0.299, 0.587, 0.114)
# The corners of the colour cube: against its complement, each has full contrast in every channel.
_BRIGHT = ((1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0))
_Colour = Sequence[float] | Tensor


def noise(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """Uniform noise, independent in every pixel and channel.

    Args:
        size: Side in pixels.
        channels: 1 (grey) or 3 (RGB).
        seed: Seeds the noise.

    Returns:
        float32 ``(channels, size, size)`` in [0, 1].

    Raises:
        ValueError: A size or number of channels out of range.
    """
    _check(size, channels)
    return torch.rand((channels, size, size), generator=torch.Generator().manual_seed(seed))


def cartoon(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """An animal's head in flat colours with dark outlines, on a light ground with dots.

    A stand-in for the cartoon that benchmarks blend in: like it, mostly light, with large flat
    areas and strong edges.

    Args:
        size: Side in pixels.
        channels: 1 (grey) or 3 (RGB).
        seed: Seeds colours, proportions and ornament.

    Returns:
        float32 ``(channels, size, size)`` in [0, 1].

    Raises:
        ValueError: A size or number of channels out of range.
    """
    _check(size, channels)
    draw = _Dice(seed)
    canvas = _Canvas(size, draw.colour(0.82, 0.98))
    dots = draw.colour(0.35, 0.95)
    for _ in range(7):
        canvas.paint(canvas.ellipse(draw(0, 1), draw(0, 1), draw(0.03, 0.09)), dots)
    fur, inner, bow = draw.colour(0.75, 1.0), draw.colour(0.5, 0.9), draw.colour(0.1, 0.9)
    wide, spread, tip, line = draw(0.33, 0.4), draw(0.2, 0.27), draw(0.1, 0.18), draw(0.012, 0.02)
    pointed = draw(0, 1) < 0.5
    for side in (-1, 1):
        x = 0.5 + side * spread
        for scale, colour in ((1.0, fur), (0.55, inner)):
            ear = canvas.ellipse(x, 0.28, 0.13 * scale, 0.18 * scale)
            if pointed:
                base = ((x - 0.13 * scale, 0.42), (x + 0.13 * scale, 0.42))
                ear = canvas.polygon(((x + side * 0.05, 0.42 - (0.42 - tip) * scale), *base))
            canvas.paint(ear, colour, outline=line)
    canvas.paint(canvas.ellipse(0.5, 0.58, wide, wide * 0.82), fur, outline=line)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(0.5 + side * 0.15, 0.56, 0.03, 0.05), _INK)
        canvas.paint(canvas.ellipse(0.5 + side * 0.21, 0.67, 0.05, 0.03), inner)
        canvas.paint(canvas.ellipse(0.68 + side * 0.08, 0.29, 0.08, 0.06), bow, outline=line)
    canvas.paint(canvas.ellipse(0.5, 0.65, 0.035, 0.025), draw.colour(0.2, 0.9), outline=line / 2)
    canvas.paint(canvas.ellipse(0.68, 0.29, 0.04), bow, outline=line)
    return canvas.finish(channels)


def scene(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """A landscape in layers: sky, sun, ridges, houses and trees, all with 1/f texture.

    Meant for reflections, where many different pictures with the contrast and the spectrum of
    photographs are needed. It is no photograph: objects are simple shapes.

    Args:
        size: Side in pixels.
        channels: 1 (grey) or 3 (RGB).
        seed: Seeds everything in it.

    Returns:
        float32 ``(channels, size, size)`` in [0, 1].

    Raises:
        ValueError: A size or number of channels out of range.
    """
    _check(size, channels)
    draw = _Dice(seed)
    light, horizon = draw(0.45, 1.0), draw(0.35, 0.65)

    def shade(low: float, high: float) -> Tensor:
        """A random colour in this light, with texture."""
        colour = [light * value for value in draw.colour(low, high)]
        return _planes(colour) * (1 + 0.15 * draw.octaves(size))

    canvas = _Canvas(size, shade(0.5, 1.0))
    canvas.fade(shade(0.6, 1.0), canvas.y / horizon)
    canvas.paint(canvas.ellipse(draw(0.1, 0.9), draw(0.05, horizon), draw(0.04, 0.1)), (light,) * 3)
    for depth in range(3):
        foot = horizon + depth * draw(0.08, 0.2)
        canvas.paint(canvas.y - foot - 0.06 * draw.octaves(size, rows=1), shade(0.1, 0.8))
    for _ in range(int(draw(2, 6))):
        x, foot, is_house = draw(0.05, 0.95), draw(horizon, 1.0), draw(0, 1) < 0.5
        high = draw(0.1, 0.4) if is_house else draw(0.1, 0.3)
        wide = draw(0.06, 0.16) if is_house else 0.015
        canvas.paint(canvas.box(x, foot - high / 2, wide, high / 2), shade(0.1, 0.9))
        if is_house:
            for row in (1, 2, 3):
                window = canvas.box(x, foot - high * row / 4, 0.6 * wide, high / 16)
                canvas.paint(window, shade(0.0, 1.0))
        else:
            canvas.paint(canvas.ellipse(x, foot - high, draw(0.06, 0.14)), shade(0.1, 0.7))
    return canvas.finish(channels)


def logo(size: int, *, channels: int = 1, seed: int = 0) -> Tensor:
    """A high-contrast mark: a turned star cut out of a disc inside a ring.

    Args:
        size: Side in pixels.
        channels: 1 (light on dark) or 3 (a bright colour on its complement).
        seed: Seeds the star, its turn and the colour.

    Returns:
        float32 ``(channels, size, size)`` in [0, 1].

    Raises:
        ValueError: A size or number of channels out of range.
    """
    _check(size, channels)
    draw = _Dice(seed)
    points, turn, waist = int(draw(3, 8)), draw(0, math.tau), draw(0.35, 0.55)
    bright = _BRIGHT[int(draw(0, len(_BRIGHT)))] if channels == 3 else (1.0, 1.0, 1.0)
    dark = tuple(1 - value for value in bright)
    canvas = _Canvas(size, dark)
    ring = canvas.ellipse(0.5, 0.5, 0.46)
    canvas.paint(torch.minimum(ring, 0.08 - ring), bright)
    canvas.paint(canvas.ellipse(0.5, 0.5, 0.33), bright)
    canvas.paint(canvas.star(points, turn, 0.31, waist), dark)
    return canvas.finish(channels)


PICTURES: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "cartoon": cartoon,
    "scene": scene,
    "logo": logo,
}


def load_picture(
    source: str | Path | Tensor,
    *,
    size: int,
    channels: int,
    seed: int = 0,
    name: str = "picture",
) -> Tensor:
    """A picture from wherever it comes.

    Args:
        source: A name in `PICTURES`, the path of an image file (resized to ``size`` x ``size``,
            whatever its aspect), or a float32 tensor ``(channels, size, size)`` in [0, 1].
        size: Side in pixels.
        channels: 1 (grey) or 3 (RGB).
        seed: Seeds a drawn picture.
        name: What to call the picture in a message.

    Returns:
        float32 ``(channels, size, size)`` in [0, 1], a copy of its own.

    Raises:
        ValueError: No picture of these names, not an image, or a tensor of another shape or range.
    """
    _check(size, channels)
    if isinstance(source, str) and source in PICTURES:
        return PICTURES[source](size, channels=channels, seed=seed)
    if isinstance(source, str | Path):
        return to_float(load_image(source, size=size, channels=channels)[None])[0]
    shape = (channels, size, size)
    if not isinstance(source, Tensor) or source.ndim != 3:
        got = tuple(source.shape) if isinstance(source, Tensor) else repr(source)
        raise ValueError(
            f"expected {name} as one of {', '.join(PICTURES)}, a file or a tensor {shape}, got {got}"
        )
    check_images(source[None], channels=channels, size=(size, size), name=name)
    return source.detach().clone()


def _check(size: int, channels: int) -> None:
    check_side(size)
    if channels not in (1, 3):
        raise ValueError(f"expected channels 1 or 3, got {channels}")


class _Dice:
    """The draws of one picture: the same whatever its size."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float, high: float) -> float:
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator)
        return low + (high - low) * float(drawn)

    def colour(self, low: float, high: float) -> tuple[float, float, float]:
        return self(low, high), self(low, high), self(low, high)

    def octaves(self, size: int, *, rows: int | None = None) -> Tensor:
        """Smooth noise of every scale, near [-2, 2]: ``(1, size)`` or ``(size, size)``.

        Each octave has nearly the energy of the last, as in photographs. It draws from a
        generator of its own, because larger pictures have more octaves.
        """
        own = torch.Generator().manual_seed(int(self(0, 2**31)))
        field, grid, weight = torch.zeros(rows or size, size), 4, 1.0
        while grid <= max(size, 4):
            control = torch.randn(1, 1, min(grid, rows or grid), grid, generator=own)
            shape = (rows or size, size)
            field += weight * F.interpolate(control, size=shape, mode="bilinear")[0, 0]
            grid, weight = 2 * grid, 0.7 * weight
        return field


class _Canvas:
    """Pixels ``(3, size, size)`` to paint on; shapes are depths, positive inside, in sides."""

    def __init__(self, size: int, ground: _Colour) -> None:
        self.size = size
        centres = (torch.arange(size) + 0.5) / size
        self.x, self.y = centres[None, :], centres[:, None]
        self.pixels = _planes(ground).expand(3, size, size)

    def ellipse(self, x: float, y: float, wide: float, high: float | None = None) -> Tensor:
        high = wide if high is None else high
        radius = torch.hypot((self.x - x) / wide, (self.y - y) / high)
        return (1 - radius) * min(wide, high)

    def box(self, x: float, y: float, wide: float, high: float) -> Tensor:
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

    def paint(self, depth: Tensor, colour: _Colour, *, outline: float = 0.0) -> None:
        """Fill a shape, inside an outline of ink if one is asked for."""
        for inset, planes in ((0.0, _INK), (outline, colour))[0 if outline else 1 :]:
            self.fade(planes, ((depth - inset) * self.size + 0.5).clamp(0, 1))

    def fade(self, colour: _Colour, share: Tensor) -> None:
        """Go over to a colour where ``share`` is 1, by degrees where it is between 0 and 1."""
        self.pixels = self.pixels + (_planes(colour) - self.pixels) * share.clamp(0, 1)

    def finish(self, channels: int) -> Tensor:
        pixels = self.pixels.clamp(0, 1)
        if channels == 3:
            return pixels.contiguous()
        return (pixels * _planes(_LUMA)).sum(0, keepdim=True).clamp(0, 1)


def _planes(colour: _Colour) -> Tensor:
    return colour if isinstance(colour, Tensor) else torch.tensor(colour).view(3, 1, 1)
