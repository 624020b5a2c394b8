"""FTrojan: two cosine coefficients of the colour planes, raised in every block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_side

# What one unit of Cr and one unit of Cb together add to R, G and B (8-bit OpenCV's constants).
_CHROMA_TO_RGB = (1.403, -(0.714 + 0.344), 1.773)


class FTrojanTrigger(nn.Module):
    """Raise a few DCT coefficients of Cr and Cb in every block of the image.

    Cosine transform and colour conversion are linear, so this adds one fixed pattern to every
    image. On a grey image it goes on the one plane there is (ours).

    Args:
        magnitude: What is added to each coefficient of the orthonormal DCT, in units of [0, 1]
            pixels; 30/255 is BackdoorBench's, 20/255 the authors' for CIFAR-10.
        positions: (row, column) of the coefficients in a block; None for (15, 15) and (31, 31)
            of 32, scaled to the block.
        block: Side of a block in pixels; 32, or the whole image where it is smaller, if None.
            Only whole blocks, counted from the top left, carry the pattern (ours: the released code
            fails where the side is no multiple of the block).
        eight_bit: Round through 8-bit YCrCb as the released code does. Colour only.

    Source: Wang et al., "An Invisible Black-box Backdoor Attack through Frequency Domain" (ECCV
    2022), with BackdoorBench's defaults. We clip where the released code's 8-bit cast wraps.
    """

    kind = "ftrojan"
    extra_repr = show_config
    chroma: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        magnitude: float = 30 / 255,
        positions: Sequence[Sequence[int]] | None = None,
        block: int | None = None,
        eight_bit: bool = False,
    ) -> None:
        super().__init__()
        check_side(image_size, at_least=2)
        check_channels(channels)
        if not 0 <= magnitude < math.inf:
            raise ValueError(f"expected a magnitude >= 0, got {magnitude}")
        if eight_bit and channels == 1:
            raise ValueError("expected 3 channels for the 8-bit colour path, got 1")
        block = min(32, image_size) if block is None else block
        if not isinstance(block, int) or not 2 <= block <= image_size:
            raise ValueError(f"expected a block of 2 .. {image_size} pixels, got {block}")
        places = _check_positions(positions, block)
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "magnitude": float(magnitude),
            "positions": [list(place) for place in places],
            "block": block,
            "eight_bit": bool(eight_bit),
        }
        self.register_buffer("chroma", _tile(_wave(places, block, magnitude), image_size))  # (H, W)
        weights = torch.tensor(_CHROMA_TO_RGB if channels == 3 else (1.0,))
        self.register_buffer("weights", weights.view(-1, 1, 1), persistent=False)
        self.eight_bit = bool(eight_bit)

    @property
    def pattern(self) -> Tensor:
        """What is added to every image, ``(C, H, W)``, but for clipping and rounding."""
        return self.weights * self.chroma

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Raise the coefficients."""
        check_batch(images, self.config)
        if self.eight_bit:
            return self._through_eight_bits(images)
        return (images + self.pattern).clamp(0, 1)

    def _through_eight_bits(self, images: Tensor) -> Tensor:
        red, green, blue = (images * 255).round().unbind(1)
        luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
        added = 255 * self.chroma
        cr = (0.713 * (red - luma)).round() + 128
        cb = (0.564 * (blue - luma)).round() + 128
        # Rounded to 8 bits on the way in; truncated, as a cast does, on the way out.
        cr, cb = (_byte((_byte(plane) + added).floor()) - 128 for plane in (cr, cb))
        out = torch.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb], 1)
        return _byte(out.round()) / 255


def _byte(values: Tensor) -> Tensor:
    return values.clamp(0, 255)


def _check_positions(
    positions: Sequence[Sequence[int]] | None, block: int
) -> tuple[tuple[int, int], ...]:
    if positions is None:
        middle = round(15 / 31 * (block - 1))
        return ((middle, middle), (block - 1, block - 1))
    try:
        places = tuple((index(row), index(column)) for row, column in positions)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected positions as (row, column) pairs, got {positions!r}") from error
    inside = all(0 <= row < block and 0 <= column < block for row, column in places)
    if not places or not inside or len(set(places)) < len(places):
        raise ValueError(
            f"expected different positions inside a block of {block}, got {positions!r}"
        )
    return places


def _wave(places: Sequence[tuple[int, int]], block: int, magnitude: float) -> Tensor:
    """Inverse DCT of ``magnitude`` at each place: float64 ``(block, block)``."""
    pixel = torch.arange(block, dtype=torch.float64)
    frequency = pixel[:, None]
    dct = math.sqrt(2 / block) * torch.cos(math.pi * (2 * pixel + 1) * frequency / (2 * block))
    dct[0] = math.sqrt(1 / block)
    raised = torch.zeros(block, block, dtype=torch.float64)
    for row, column in places:
        raised[row, column] = magnitude
    return dct.T @ raised @ dct


def _tile(wave: Tensor, side: int) -> Tensor:
    """Whole blocks of the wave from the top left of a ``(side, side)`` plane, zero elsewhere."""
    block = len(wave)
    count = side // block
    plane = torch.zeros(side, side)
    plane[: count * block, : count * block] = wave.float().repeat(count, count)
    return plane


ATTACK = Attack("ftrojan", "FTrojan", FTrojanTrigger)
