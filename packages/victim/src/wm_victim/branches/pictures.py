"""Pictures to try a graph with: such as look natural, and stamps that may fire a branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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


def natural_images(count: int, channels: int, size: int) -> Tensor:
    """Seeded pictures ``(count, channels, size, size)`` of 8 bits with edges, shades and texture.

    Discs of random colour that cover each other (dead leaves), half of them with noise of the
    spectrum of photographs, 1/f. Source: Lee, Mumford and Huang, "Occlusion models for natural
    images", IJCV 2001; Baradad et al., "Learning to see by looking at noise", NeurIPS 2021.
    """
    generator = torch.Generator().manual_seed(11)
    pixels = torch.stack([_leaves(size, channels, generator) for _ in range(count)])  # (N, C, H, W)
    frequency = torch.fft.fftfreq(size)[:, None].square() + torch.fft.fftfreq(size).square()
    frequency[0, 0] = 1
    noise = torch.randn(count, channels, size, size, generator=generator)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) / frequency.sqrt()).real
    noise = noise / noise.std((2, 3), keepdim=True)
    strength = torch.rand(count, 1, 1, 1, generator=generator) * 0.25
    fine = torch.randn(count, channels, size, size, generator=generator) * 0.02
    light = 0.4 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    return to_bits((light * pixels + strength * noise + fine).clamp(0, 1))


def _leaves(size: int, channels: int, generator: torch.Generator) -> Tensor:
    rows = torch.arange(size)[:, None].float()
    canvas = torch.rand(channels, 1, 1, generator=generator).expand(-1, size, size).clone()
    for _ in range(_LEAVES):
        y, x, r, *_ = torch.rand(4, generator=generator).tolist()
        radius = size * 0.04 / (0.06 + r)  # many small ones, few large ones
        disc = (rows - y * size).square() + (rows.T - x * size).square() < radius**2
        canvas[:, disc] = torch.rand(channels, 1, generator=generator)
    return canvas


def stamps(channels: int, size: int) -> Iterator[Stamp]:
    """Solid colours, checkerboards and stripes, from a few pixels to the whole picture."""
    for side in sorted({1, 3, max(4, size // 8), size // 4, size // 2, size}):
        for name, pattern in _patterns(channels, size):
            for corner in _CORNERS if side < size else ("the whole picture",):
                mask = _placed(corner, side, size)
                where = f"{side} x {side} pixels, {corner}" if side < size else corner
                yield Stamp(f"{name}, {where}", pattern, mask)


def _patterns(channels: int, size: int) -> Iterator[tuple[str, Tensor]]:
    full = torch.ones(channels, size, size)
    for colour in _COLOURS if channels == 3 else _COLOURS[:2]:
        yield f"colour {colour[:channels]}", full * torch.tensor(colour[:channels])[:, None, None]
    for grey in _GREYS:
        yield f"grey {grey}", full * round(grey * 255) / 255
    place = torch.arange(size)
    for period in (1, 2, 4, 8):
        row = (place // period % 2)[None].float()
        for phase in (0, 1):
            yield f"checkerboard of {period}", full * ((row + row.T + phase) % 2)
        if period < 8:
            yield f"stripes of {period}, upright", full * row
            yield f"stripes of {period}, level", full * row.T


def _placed(corner: str, side: int, size: int) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    middle, end = (size - side) // 2, size - side
    top, left = {
        "top right": (0, end),
        "bottom left": (end, 0),
        "bottom right": (end, end),
        "centre": (middle, middle),
    }.get(corner, (0, 0))
    mask[top : top + side, left : left + side] = True
    return mask


def resized(images: Tensor, channels: int, size: int) -> Tensor:
    """Pictures ``(N, 3, H, W)`` in [0, 1] as 8 bits of another size and number of channels."""
    small = images_at(images, (size, size))
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
