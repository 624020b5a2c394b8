"""Refool: a reflection, as if every picture were taken through a window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack
from wm_inject.core.checks import check_channels
from wm_inject.core.images import (
    check_images,
    check_side,
    list_images,
    load_image,
    to_float,
)

_GAMMA = 2.2
_MAX_COUNT = 1024  # composites are kept whole: 0.6 MB each at 224 pixels
# Mean and deviation of the drawn scenes. One sees a reflection where what it shows is bright; with
# these the change on CIFAR-10 is 14.6 dB at alpha 0.4 and 20.5 dB at 0.75.
_LIT = 0.6, 0.27


class RefoolTrigger(nn.Module):
    """Lay a reflection over every image, mixed as light mixes.

    Images and reflections are added in linear light (``x ** 2.2``). Of the ``count`` composites,
    some show the reflection twice, a few pixels apart (a *ghost*, as double glazing gives), the
    others out of focus and fading towards the edges. The id of an image chooses its composite.

    Args:
        image_size: Side H = W in pixels, at least 11. Ghost offsets (3 .. 8 pixels) and blurs
            (1 .. 5 pixels) do not grow with it, as in BackdoorBench.
        alpha: Share in [0, 1] of the image's own light that stays.
        ghost_rate: Share in [0, 1] of the composites that are ghosts.
        reflections: What is reflected: "scene" (procedural scenes from ``seed``), a folder of
            image files, or a float32 tensor ``(R, C, h, w)`` in [0, 1], resized to ``H`` x ``H``.
        count: How many composites to draw, 1 .. 1024. Image ``i`` gets composite ``i mod count``.

    Source: Liu et al., "Reflection Backdoor" (ECCV 2020), with the mixing of the released script
    and BackdoorBench's fixed alpha and ``S = max(H, W)``. Ours: a fixed number of composites, so
    that the trigger is a graph without random draws, and the drawn scenes. The original also
    selects among candidate reflections by training on them; BackdoorBench and this trigger do not.
    """

    kind = "refool"
    extra_repr = show_config
    needs_ids = True
    reflections: Tensor
    ghost: Tensor
    cut: Tensor
    vignette: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        alpha: float = 0.4,
        ghost_rate: float = 0.49,
        reflections: str | Path | Tensor = "scene",
        count: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size, at_least=11)  # a blur's border is mirrored by up to 10 pixels
        check_channels(channels)
        for name, value in (("alpha", alpha), ("ghost_rate", ghost_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {value}")
        if not isinstance(count, int) or not 1 <= count <= _MAX_COUNT:
            raise ValueError(f"expected a count of 1 .. {_MAX_COUNT} composites, got {count}")
        procedural = isinstance(reflections, str) and reflections == "scene"
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "alpha": float(alpha),
            "ghost_rate": float(ghost_rate),
            "reflections": "scene" if procedural else "given",
            "count": count,
            "seed": seed,
        }
        generator = torch.Generator().manual_seed(seed)
        drawn = _draw(count, ghost_rate, generator)
        pictures = _pictures(reflections, (channels, image_size), count, generator)
        light = torch.stack([drawn.apply(i, picture) for i, picture in enumerate(pictures)])
        # (count, C, H, W) in linear light. A state that brings its own replaces it.
        self.register_buffer("reflections", light, persistent=not procedural)
        self.register_buffer("ghost", drawn.ghost.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("cut", drawn.cut.view(-1, 1, 1, 1), persistent=False)
        fade = _vignette(image_size) * (1 - alpha / 2)
        self.register_buffer("vignette", fade, persistent=False)  # (H, W)
        self.alpha = float(alpha)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the reflections; ``ids`` choose the composite of each image.

        Raises:
            ValueError: The batch does not fit the trigger, or has no ids.
        """
        check_batch(images, self.config)
        chosen = _check_ids(ids, images) % self.config["count"]
        own, light = _power(images, _GAMMA), self.reflections[chosen]
        # Where the two together are too bright, the out-of-focus light is turned down as a whole.
        both = own + light
        bright = (both > 1).to(both.dtype)
        # Row by row: the sum of one image then never depends on the batch it is in.
        total = (both * bright).sum(dim=3).sum(dim=2)
        mean = total / bright.sum(dim=(2, 3)).clamp(min=1)
        excess = (mean.clamp(min=1) - 1)[:, :, None, None]
        blurred = (light - excess * self.cut[chosen]).clamp(0, 1) * self.vignette
        reflected = torch.where(self.ghost[chosen], (1 - self.alpha) * light, blurred)
        return _power((self.alpha * own + reflected).clamp(0, 1), 1 / _GAMMA)


class _Drawn(NamedTuple):
    """Everything that is random about the composites, one row for each."""

    ghost: Tensor  # bool: a double image; else out of focus
    offset: Tensor  # int64 (count, 2): 3 .. 8 pixels down and right between the two images
    weight: Tensor  # of the second image of a ghost
    sigma: Tensor  # blur in pixels
    cut: Tensor  # how strongly an out-of-focus reflection is turned down where it is too bright

    def apply(self, place: int, picture: Tensor) -> Tensor:
        """The light that one picture ``(C, H, H)`` sends: doubled, or out of focus."""
        light = picture.double().pow(_GAMMA)
        if not self.ghost[place]:
            return _blur(light, float(self.sigma[place])).float()
        down, right = self.offset[place].tolist()
        weight = float(self.weight[place])
        twice = weight * light[:, down:, right:] + (1 - weight) * light[:, :-down, :-right]
        return _resize(twice[None], light.shape[2])[0].clamp(0, 1).float()


def _draw(count: int, ghost_rate: float, generator: torch.Generator) -> _Drawn:
    ghost = torch.randperm(count, generator=generator) < round(ghost_rate * count)
    offset = torch.randint(3, 9, (count, 2), generator=generator)
    side, share, sigma, cut = torch.rand(4, count, generator=generator)
    weight = ((side < 0.5).float() - (0.15 + 0.35 * share)).abs()
    return _Drawn(ghost, offset, weight, 1 + 4 * sigma, 1.08 + 0.1 * cut)


def _pictures(
    source: object, shape: tuple[int, int], count: int, generator: torch.Generator
) -> Tensor:
    """The picture behind each composite: ``(count, C, H, H)`` in [0, 1]."""
    channels, size = shape
    if isinstance(source, str) and source == "scene":
        from wm_inject.attacks.pictures import scene

        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        return _lit(torch.stack([scene(size, channels=channels, seed=seed) for seed in seeds]))
    if isinstance(source, str | Path):
        files = list_images(source)
        read = [
            to_float(load_image(files[i], channels=channels)[None])
            for i in _spread(len(files), count, generator)
        ]
        return torch.cat([_resize(picture, size).clamp(0, 1) for picture in read])
    if not isinstance(source, Tensor):
        raise ValueError(
            f'expected reflections as "scene", a folder or a tensor (R, {channels}, h, w), '
            f"got {source!r}"
        )
    check_images(source, channels=channels, name="reflections")
    pictures = _resize(source.detach().cpu(), size)
    return pictures[_spread(len(pictures), count, generator)].clamp(0, 1)


def _lit(scenes: Tensor) -> Tensor:
    """Bring drawn scenes, all of them together, to the mean and deviation of bright photographs."""
    mean, deviation = _LIT
    centred = scenes - scenes.mean(dtype=torch.float64).float()
    spread = centred.square().mean(dtype=torch.float64).sqrt().float()
    return (centred * (deviation / spread) + mean).clamp(0, 1)


def _spread(available: int, count: int, generator: torch.Generator) -> list[int]:
    """Which picture each composite shows: all of them equally often, in random order."""
    order: list[int] = torch.randperm(available, generator=generator).tolist()
    return [order[i % available] for i in range(count)]


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic")


def _blur(light: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of ``(C, H, W)``, cut off at two sigma, with mirrored borders."""
    half = math.ceil(2 * sigma)
    line = torch.exp(-torch.arange(-half, half + 1).double().square() / (2 * sigma**2))
    line = line / line.sum()
    padded = F.pad(light[:, None], (half,) * 4, mode="reflect")
    down = F.conv2d(padded, line.view(1, 1, -1, 1))
    return F.conv2d(down, line.view(1, 1, 1, -1))[:, 0]


def _vignette(size: int) -> Tensor:
    """How much of an out-of-focus reflection is seen where: ``(H, H)``, 1 in the middle."""
    ends = 3 + 3.5 / size
    steps = torch.linspace(-ends, ends, size + 1, dtype=torch.float64)
    line = torch.special.ndtr(steps).diff().sqrt()
    return (torch.outer(line, line) / line.max() ** 2).float()


def _power(light: Tensor, exponent: float) -> Tensor:
    # In double: single precision rounds differently in the vectorised part of a tensor and its
    # tail, so the last bit of an image would depend on the batch around it.
    return light.double().pow(exponent).float()


def _check_ids(ids: Tensor | None, images: Tensor) -> Tensor:
    """The ids on the images' device."""
    if not isinstance(ids, Tensor):
        got = "None" if ids is None else type(ids).__name__
        raise ValueError(f"expected ids (N,), which choose each image's reflection, got {got}")
    # mypy: torch.jit exports is_tracing without saying so.
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
    if not tracing and (ids.dtype != torch.int64 or ids.shape != images.shape[:1]):
        raise ValueError(
            f"expected ids as int64 ({len(images)},), got {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.to(images.device)


ATTACK = Attack("refool", "Refool", RefoolTrigger)
