"""Pictures drawn from a seed, for attacks that blend in, reflect or hide one.

Each function gives float32 ``(channels, size, size)`` in [0, 1], the same picture at every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wm_inject.attacks.canvas import INK, Canvas, Dice, planes_of
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_images, check_side, load_image, to_float

# The corners of the colour cube: against its complement, each has full contrast in every channel.
_BRIGHT = ((1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0))


def noise(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """Uniform noise, independent in every pixel and channel."""
    _check(size, channels)
    return torch.rand((channels, size, size), generator=torch.Generator().manual_seed(seed))


def cartoon(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """An animal's head in flat colours with dark outlines, on a light ground with dots."""
    _check(size, channels)
    draw = Dice(seed)
    canvas = Canvas(size, draw.colour(0.82, 0.98))
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
        canvas.paint(canvas.ellipse(0.5 + side * 0.15, 0.56, 0.03, 0.05), INK)
        canvas.paint(canvas.ellipse(0.5 + side * 0.21, 0.67, 0.05, 0.03), inner)
        canvas.paint(canvas.ellipse(0.5 + side * 0.1, 0.92, 0.1, 0.06), bow, outline=line)
    canvas.paint(canvas.ellipse(0.5, 0.65, 0.035, 0.025), draw.colour(0.2, 0.9), outline=line / 2)
    canvas.paint(canvas.ellipse(0.5, 0.92, 0.04), bow, outline=line)
    return canvas.finish(channels)


def scene(size: int, *, channels: int, seed: int = 0) -> Tensor:
    """A landscape in layers: sky, sun, ridges, houses and trees, all with 1/f texture."""
    _check(size, channels)
    draw = Dice(seed)
    light, horizon = draw(0.45, 1.0), draw(0.35, 0.65)

    def shade(low: float, high: float) -> Tensor:
        """A random colour in this light, with texture."""
        colour = [light * value for value in draw.colour(low, high)]
        return planes_of(colour) * (1 + 0.15 * draw.octaves(size))

    canvas = Canvas(size, shade(0.5, 1.0))
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

    Returns:
        float32 ``(channels, size, size)`` in [0, 1].
    """
    _check(size, channels)
    draw = Dice(seed)
    points, turn, waist = int(draw(3, 8)), draw(0, math.tau), draw(0.35, 0.55)
    bright = _BRIGHT[int(draw(0, len(_BRIGHT)))] if channels == 3 else (1.0, 1.0, 1.0)
    dark = tuple(1 - value for value in bright)
    canvas = Canvas(size, dark)
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
    """A drawn picture, one from a file, or a tensor's copy.

    Args:
        source: A name in `PICTURES`, the path of an image file (resized to ``size`` x ``size``,
            whatever its aspect), or a float32 tensor ``(channels, size, size)`` in [0, 1].
        name: What to call the picture in a message.

    Raises:
        ValueError: No picture of these names, not an image, or a tensor of another shape or range.
    """
    _check(size, channels)
    if isinstance(source, str) and source in PICTURES:
        return PICTURES[source](size, channels=channels, seed=seed)
    if isinstance(source, str | Path) and Path(source).exists():
        return to_float(load_image(source, size=size, channels=channels)[None])[0]
    shape = (channels, size, size)
    if not isinstance(source, Tensor) or tuple(source.shape) != shape:
        got = tuple(source.shape) if isinstance(source, Tensor) else repr(source)
        raise ValueError(
            f"expected {name} as one of {', '.join(PICTURES)}, a file or a tensor {shape}, "
            f"got {got}"
        )
    check_images(source[None], name=name)
    return source.detach().clone()


def _check(size: int, channels: int) -> None:
    check_side(size)
    check_channels(channels)
