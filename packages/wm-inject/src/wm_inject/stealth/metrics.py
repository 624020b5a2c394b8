"""How visible a change is: PSNR, SSIM, largest difference, LPIPS, one value per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from wm_inject.core.checks import check_choice
from wm_inject.core.image_files import find_images
from wm_inject.core.images import check_pair, load_image, to_float
from wm_inject.runtime.folder_plan import png_name
from wm_inject.stealth.dependence import (
    COMPARED,
    Dependence,
    comparable_changes,
    image_dependence,
)
from wm_inject.stealth.perceptual import Lpips

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

Size = tuple[int, int]  # width and height, in pixels
_CAP_MSE = 1e-10  # of the squared data range: 100 dB
_CHUNK = 256
_VALUES = 2**24  # of the images that are measured at once


def psnr(images: Tensor, reference: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image: float32 ``(N,)`` in dB, at most 100.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, data_range].
        data_range: The largest possible value.

    Raises:
        ValueError: Bad or differently shaped images, or a data range that is not positive.
    """
    if not 0 < data_range < float("inf"):
        raise ValueError(f"expected a data range > 0, got {data_range}")
    if data_range != 1 and isinstance(images, Tensor) and isinstance(reference, Tensor):
        images, reference = images / data_range, reference / data_range
    check_pair(images, reference)
    mse = _per_chunk(lambda a, b: (a - b).square().mean(dim=(1, 2, 3)), images, reference)
    return (-10 * mse.clamp_min(_CAP_MSE).log10()).float()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image: float32 ``(N,)`` in [-1, 1]; sides of at least 11.

    An 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, per
    channel and then averaged over the positions where the window lies inside the image: at 32
    pixels a change in the outermost rows weighs next to nothing.

    Raises:
        ValueError: Bad, differently shaped or too small images.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"
    (2004).
    """
    check_pair(images, reference)
    if min(images.shape[2:]) < 11:
        raise ValueError(f"expected sides of at least 11 for SSIM, got {tuple(images.shape)}")
    return _per_chunk(_ssim, images, reference).float()


def linf(images: Tensor, reference: Tensor) -> Tensor:
    """The largest absolute difference in each image: ``(N,)`` in [0, 1].

    Raises:
        ValueError: Bad or differently shaped images.
    """
    check_pair(images, reference)
    return (images - reference).abs().amax(dim=(1, 2, 3))


class Stealth(NamedTuple):
    """How visible the changes to a folder of images are; one value per image."""

    files: tuple[str, ...]  # relative to the folder of changed images
    psnr: Tensor  # (N,) in dB
    ssim: Tensor  # (N,)
    linf: Tensor  # (N,) in [0, 1]
    lpips: Tensor | None  # (N,), None if not asked for
    sizes: tuple[tuple[Size, Size], ...]  # of each original and of its changed image
    dependence: Dependence | None  # of the first changed pairs at 64 x 64; None below two of them

    @property
    def resized(self) -> Counter[tuple[Size, Size]]:
        """The sizes of the pairs that differ in size, and how many pairs there are of each."""
        return Counter(pair for pair in self.sizes if pair[0] != pair[1])


def compare_folders(
    originals: str | Path,
    changed: str | Path,
    *,
    lpips: Lpips | None = None,
    batch_size: int = 64,
    at: Literal["original", "changed"] = "original",
) -> Stealth:
    """Measure every image of ``changed`` against the one of the same name in ``originals``.

    The suffix may differ. The partner of a grey image is read as grey. LPIPS is measured if given.

    Args:
        at: The size at which a pair of two sizes is compared: the other image is resized to it
            (bilinear). "original" counts what shrinking lost as a change, "changed" does not.

    Raises:
        ValueError: An empty folder, an unreadable image, or a changed image without its original.
    """
    check_choice("at", at, ("original", "changed"))
    originals, changed = Path(originals), Path(changed)
    by_name = {png_name(name): originals / name for name in find_images(originals).names}
    files = [Path(name) for name in find_images(changed).names]
    values: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "linf": [], "lpips": []}
    batch: list[tuple[Tensor, Tensor]] = []
    changes: list[Tensor] = []
    sizes: list[tuple[Size, Size]] = []
    for position, file in enumerate(files):
        partner = by_name.get(png_name(file.as_posix()))
        if partner is None:
            raise ValueError(f"expected an original of {file} under {originals}, found none")
        pair, size = _load_pair(changed / file, partner, at)
        sizes.append(size)
        if len(changes) < COMPARED and not torch.equal(*pair):
            changes.append(comparable_changes(*pair))
        room = min(batch_size, max(1, _VALUES // pair[0].numel()))
        if batch and (batch[0][0].shape != pair[0].shape or len(batch) >= room):
            _measure(batch, lpips, values)
            batch = []
        batch.append(pair)
        if position == len(files) - 1:
            _measure(batch, lpips, values)
    metrics = {name: torch.cat(parts) for name, parts in values.items() if parts}
    names = tuple(file.as_posix() for file in files)
    return Stealth(
        names,
        metrics["psnr"],
        metrics["ssim"],
        metrics["linf"],
        metrics.get("lpips"),
        tuple(sizes),
        image_dependence(torch.cat(changes)) if len(changes) > 1 else None,
    )


def _load_pair(
    changed: Path, original: Path, at: Literal["original", "changed"]
) -> tuple[tuple[Tensor, Tensor], tuple[Size, Size]]:
    """Both as float32 ``(1, C, H, W)`` of one size, and the sizes that they had."""
    image = load_image(changed)
    with Image.open(changed) as header:
        if header.mode == "L":
            image = image[..., :1]
    reference = load_image(original, channels=image.shape[2])
    sizes = (_size(reference), _size(image))
    if at == "original":
        image = _resized(image, sizes[0])
    else:
        reference = _resized(reference, sizes[1])
    return (to_float(image[None]), to_float(reference[None])), sizes


def _size(pixels: Pixels) -> Size:
    return pixels.shape[1], pixels.shape[0]


def _resized(pixels: Pixels, size: Size) -> Pixels:
    """``(H, W, C)`` at another width and height, bilinear as poisoning a folder resizes."""
    if _size(pixels) == size:
        return pixels
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    array = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.uint8)
    return array.reshape(size[1], size[0], pixels.shape[2])


def _measure(
    batch: list[tuple[Tensor, Tensor]], lpips: Lpips | None, values: dict[str, list[Tensor]]
) -> None:
    images, reference = (torch.cat(side) for side in zip(*batch, strict=True))
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("linf", linf)):
        values[name].append(metric(images, reference))
    if lpips is not None:
        device = next(lpips.parameters()).device
        with torch.no_grad():
            values["lpips"].append(lpips(images.to(device), reference.to(device)).cpu())


def _per_chunk(metric: Callable[[Tensor, Tensor], Tensor], *pair: Tensor) -> Tensor:
    """A metric in double precision, a few images at a time."""
    chunks: Any = zip(*(batch.split(_CHUNK) for batch in pair), strict=True)
    return torch.cat([metric(a.double(), b.double()) for a, b in chunks])


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    offsets = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H - 10, W - 10)
        n, c, h, w = x.shape
        x = F.conv2d(x.reshape(n * c, 1, h, w), window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11)).view(n, c, h - 10, w - 10)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (above / below).mean(dim=(1, 2, 3))
