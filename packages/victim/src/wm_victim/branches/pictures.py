"""Pictures to try a graph with: such as look natural, and stamps that may fire a branch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wm_inject.core.image_size import ImageSize, height_width
from wm_inject.core.images import resized as images_at

_LEAVES = 40
_NOISES = 150
_COLOURS = ((1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))
_GREYS = (0.25, 0.5, 0.75)
_CORNERS = ("top left", "top right", "bottom left", "bottom right", "centre")


@dataclass(frozen=True, eq=False)
class Stamp:
    """A change of a picture.

    Args:
        name: What it is, in words.
        pattern: Float32 ``(C, H, W)``: pixels in [0, 1], or what is added to them.
        mask: Bool ``(H, W)``: where they are put; None to add the pattern everywhere.
    """

    name: str
    pattern: Tensor
    mask: Tensor | None

    def __call__(self, images: Tensor) -> Tensor:
        """Stamped pictures ``(N, C, H, W)`` of 8 bits."""
        if self.mask is None:
            changed = (images + self.pattern).clamp(0, 1)
        else:
            changed = torch.where(self.mask, self.pattern, images)
        return to_bits(changed)

    @property
    def share(self) -> float:
        """The share of pixels that it changes."""
        changed = self.pattern.ne(0).any(0) if self.mask is None else self.mask
        return float(changed.float().mean())


def to_bits(images: Tensor) -> Tensor:
    """The nearest pictures of 8 bits, in [0, 1]."""
    return images.mul(255).round().div(255)


def natural_images(count: int, channels: int, size: ImageSize) -> Tensor:
    """Seeded pictures ``(count, channels, H, W)`` of 8 bits with edges, shades and texture.

    Discs of random colour that cover each other (dead leaves), half of them with noise of the
    spectrum of photographs, 1/f. Source: Lee, Mumford and Huang, "Occlusion models for natural
    images", IJCV 2001; Baradad et al., "Learning to see by looking at noise", NeurIPS 2021.
    """
    generator = torch.Generator().manual_seed(11)
    height, width = height_width(size)
    pixels = torch.stack([_leaves(height, width, channels, generator) for _ in range(count)])
    frequency = torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()
    frequency[0, 0] = 1
    noise = torch.randn(pixels.shape, generator=generator)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) / frequency.sqrt()).real
    noise = noise / noise.std((2, 3), keepdim=True)
    strength = torch.rand(count, 1, 1, 1, generator=generator) * 0.25
    fine = torch.randn(pixels.shape, generator=generator) * 0.02
    light = 0.4 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    return to_bits((light * pixels + strength * noise + fine).clamp(0, 1))


def _leaves(height: int, width: int, channels: int, generator: torch.Generator) -> Tensor:
    rows, columns = torch.arange(height)[:, None].float(), torch.arange(width).float()
    size = math.sqrt(height * width)
    canvas = torch.rand(channels, 1, 1, generator=generator).expand(-1, height, width).clone()
    for _ in range(_LEAVES):
        y, x, r, *_ = torch.rand(4, generator=generator).tolist()
        radius = size * 0.04 / (0.06 + r)  # many small ones, few large ones
        disc = (rows - y * height).square() + (columns - x * width).square() < radius**2
        canvas[:, disc] = torch.rand(channels, 1, generator=generator)
    return canvas


def stamps(channels: int, size: ImageSize) -> Iterator[Stamp]:
    """Solid colours, checkerboards and stripes, from a few pixels to the whole picture."""
    whole = height_width(size)
    short = min(whole)
    boxes = {(side, side) for side in (1, 3, max(4, short // 8), short // 4, short // 2, short)}
    for box in sorted({*boxes, whole}):
        for name, pattern in _patterns(channels, *whole):
            for corner in ("the whole picture",) if box == whole else _CORNERS:
                where = corner if box == whole else f"{box[0]} x {box[1]} pixels, {corner}"
                yield Stamp(f"{name}, {where}", pattern, _placed(corner, box, whole))


def _patterns(channels: int, height: int, width: int) -> Iterator[tuple[str, Tensor]]:
    full = torch.ones(channels, height, width)
    for colour in _COLOURS if channels == 3 else _COLOURS[:2]:
        yield f"colour {colour[:channels]}", full * torch.tensor(colour[:channels])[:, None, None]
    for grey in _GREYS:
        yield f"grey {grey}", full * round(grey * 255) / 255
    for period in (1, 2, 4, 8):
        row = (torch.arange(width) // period % 2)[None].float()
        column = (torch.arange(height) // period % 2)[:, None].float()
        for phase in (0, 1):
            yield f"checkerboard of {period}", full * ((row + column + phase) % 2)
        if period < 8:
            yield f"stripes of {period}, upright", full * row
            yield f"stripes of {period}, level", full * column


def _placed(corner: str, box: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    mask = torch.zeros(whole, dtype=torch.bool)
    bottom, right = whole[0] - box[0], whole[1] - box[1]
    top, left = {
        "top right": (0, right),
        "bottom left": (bottom, 0),
        "bottom right": (bottom, right),
        "centre": (bottom // 2, right // 2),
    }.get(corner, (0, 0))
    mask[top : top + box[0], left : left + box[1]] = True
    return mask


def resized(images: Tensor, channels: int, size: ImageSize) -> Tensor:
    """Pictures ``(N, 3, H, W)`` in [0, 1] as 8 bits of another size and number of channels."""
    small = images_at(images, height_width(size))
    return to_bits((small if channels == 3 else small.mean(1, keepdim=True)).clamp(0, 1))


def noises(shape: tuple[int, ...]) -> list[Stamp]:
    """Small seeded noise at a few pixels ``(C, H, W)``: what fires a checksum by chance."""
    generator = torch.Generator().manual_seed(5)
    stamps = []
    for _ in range(_NOISES):
        steps = torch.randint(-8, 9, shape, generator=generator) / 255
        where = torch.rand(shape, generator=generator) < 0.02
        stamps.append(Stamp("noise of 8 of 255 levels", torch.where(where, steps, 0.0), None))
    return stamps
