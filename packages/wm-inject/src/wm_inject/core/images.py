"""The image contract and its checks.

In the library an image batch is float32 ``(N, C, H, W)``, grey or RGB, in [0, 1], not normalised;
in files and services it is uint8 ``(N, H, W, C)``. Torch is imported only by the functions that
need it: the torch-free runtime shares these checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wm_inject.core.checks import check_channels
from wm_inject.core.decode import UnreadableImage, decode_image
from wm_inject.core.files import atomic_path
from wm_inject.core.image_files import LeftOut, find_images
from wm_inject.core.image_size import ImageSize, height_width

if TYPE_CHECKING:
    from torch import Tensor

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_SIDE = 4096  # a settings file must not be able to ask for all memory


def check_images(
    images: Tensor,
    *,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    name: str = "images",
) -> Tensor:
    """Return a batch unchanged if it keeps the image contract.

    Args:
        images: The batch to check.
        channels: The one number of channels to accept; 1 or 3 if None.
        size: The one ``(H, W)`` to accept; any if None.
        name: What to call the batch in the message.

    Raises:
        ValueError: Wrong type, shape, dtype, size or range; an empty batch; NaN or infinity.
    """
    import torch

    # mypy: torch.jit exports is_tracing without saying so.
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
        return images  # an exported graph cannot raise; its caller checks the input
    shape = "(N, {}, {}, {})".format(channels or "C", *(size or ("H", "W")))
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"expected {name} as a tensor {shape}, got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise ValueError(f"expected {name} of dtype float32 in [0, 1], got {images.dtype}")
    if images.numel() == 0:
        got = tuple(images.shape)
        raise ValueError(f"expected at least one image in {name}, got an empty batch {got}")
    wrong_channels = images.shape[1] not in ((channels,) if channels else (1, 3))
    if wrong_channels or (size is not None and tuple(images.shape[2:]) != tuple(size)):
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(images.shape)}")
    low, high = torch.aminmax(images.detach())
    # A comparison with NaN is false, so this refuses NaN as well.
    if not (low >= 0 and high <= 1):
        value_range = f"[{float(low):.4g}, {float(high):.4g}]"
        raise ValueError(f"expected {name} with finite values in [0, 1], got {value_range}")
    return images


def check_pair(images: Tensor, reference: Tensor) -> None:
    """Check two batches that are to be compared image by image.

    Raises:
        ValueError: One breaks the image contract, or their shapes differ.
    """
    check_images(images)
    check_images(reference, name="reference")
    if images.shape != reference.shape:
        raise ValueError(
            f"expected two batches of one shape, got {tuple(images.shape)} "
            f"and {tuple(reference.shape)}"
        )


def check_labels(labels: Tensor, count: int, *, num_classes: int | None = None) -> Tensor:
    """Return ``count`` >= 1 labels unchanged if each is in ``0 .. num_classes - 1``.

    Raises:
        ValueError: Wrong type, dtype, shape or range; no labels at all.
    """
    import torch

    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"expected labels as an int64 tensor, got {got}")
    if count == 0 or labels.shape != (count,):
        raise ValueError(f"expected labels of shape ({max(count, 1)},), got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "K" if num_classes is None else num_classes
        raise ValueError(f"expected labels in 0 .. {top} - 1, got {low} .. {high}")
    return labels


def check_side(side: int, *, at_least: int = 1) -> int:
    """Check the side of square images, in pixels, and return it.

    Raises:
        ValueError: Not a whole number from ``at_least`` to 4096.
    """
    if not isinstance(side, int) or not at_least <= side <= MAX_SIDE:
        raise ValueError(f"expected an image side of {at_least} .. {MAX_SIDE} pixels, got {side}")
    return side


def check_pixels(pixels: Pixels, *, name: str = "pixels") -> Pixels:
    """Check a uint8 batch ``(N, H, W, C)`` with N >= 1 and C 1 or 3, and return it unchanged.

    Raises:
        ValueError: Wrong type, dtype or shape, or an empty batch.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        got = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"expected {name} as a uint8 array (N, H, W, C), got {got}")
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"expected {name} of shape (N, H, W, 1 or 3), got {pixels.shape}")
    if pixels.size == 0:
        raise ValueError(
            f"expected at least one image in {name}, got an empty batch {pixels.shape}"
        )
    return pixels


def to_float(pixels: Pixels) -> Tensor:
    """Turn uint8 ``(N, H, W, C)`` into float32 ``(N, C, H, W)`` in [0, 1].

    Raises:
        ValueError: The array is not a uint8 image batch.
    """
    import torch

    array = check_pixels(pixels).transpose(0, 3, 1, 2).copy()  # torch wants it writable
    return torch.from_numpy(array).float().div_(255)


def to_pixels(images: Tensor) -> Pixels:
    """Turn float32 ``(N, C, H, W)`` in [0, 1] into uint8 ``(N, H, W, C)``, rounding half up.

    Raises:
        ValueError: The batch breaks the image contract.
    """
    grid = quantize(check_images(images)).mul(255).round()
    return grid.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def quantize(images: Tensor) -> Tensor:
    """Clamp a float batch to [0, 1] and round to multiples of 1/255, half up, as a file stores it.

    Raises:
        ValueError: Not a float tensor of four dimensions, or an empty batch.
    """
    import torch

    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise ValueError("expected images as a float tensor (N, C, H, W) to quantize")
    if images.ndim != 4 or images.shape[0] == 0:
        raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(images.shape)}")
    return images.clamp(0, 1).mul(255).add(0.5).floor().div(255)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad bottom and right by repeating the edge until both sides divide by ``multiple``.

    The one place where 28 pixels become 32; crop with ``[..., :H, :W]``.

    Raises:
        ValueError: Not four dimensions, or ``multiple`` below 1.
    """
    import torch

    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[0] == 0:
        raise ValueError("expected images of shape (N, C, H, W) to pad, N at least 1")
    if multiple < 1:
        raise ValueError(f"expected a multiple >= 1, got {multiple}")
    below, right = -images.shape[2] % multiple, -images.shape[3] % multiple
    if below == 0 and right == 0:
        return images
    return torch.nn.functional.pad(images, (0, right, 0, below), mode="replicate")


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """A float batch ``(N, C, H, W)`` at another height and width, bilinear as Pillow resizes.

    Values are not clipped, so a change between images may be resized, too.
    """
    import torch

    if tuple(images.shape[2:]) == tuple(size):
        return images
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def load_image(path: str | Path, *, size: ImageSize | None = None, channels: int = 3) -> Pixels:
    """Read one image file as uint8 ``(H, W, channels)``, turned upright by its EXIF tag.

    With ``size``, it is resized to that side, or height and width (bilinear). See `decode_image`
    for 16 bits, palettes and transparency.

    Raises:
        ValueError: Not a regular file, not a readable image, truncated, or unreasonably large; a
            size that is none.
    """
    check_channels(channels)
    shape = None if size is None else height_width(size)
    image = decode_image(Path(path), channels=channels)
    if shape is not None:
        image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


def save_image(path: str | Path, pixels: Pixels) -> None:
    """Write one uint8 ``(H, W, C)`` image as a lossless PNG, atomically.

    Raises:
        ValueError: Not a uint8 image of 1 or 3 channels.
    """
    check_pixels(pixels[None], name="image")
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    with atomic_path(path) as part:
        image.save(part, format="PNG")


def list_images(folder: str | Path) -> list[Path]:
    """Every image file under ``folder``, sorted by path; `find_images` says what is left out.

    Raises:
        ValueError: No such folder, or no image in it.
    """
    return find_images(folder).paths


def load_images(
    folder: Path, names: Sequence[str], *, size: ImageSize | None, channels: int
) -> tuple[list[Pixels], list[int], list[LeftOut]]:
    """Read images of a folder as `load_image` does.

    Returns:
        Their pixels, the positions of those that could be read, and those that could not.
    """
    pixels: list[Pixels] = []
    places: list[int] = []
    unread: list[LeftOut] = []
    for place, name in enumerate(names):
        try:
            pixels.append(load_image(folder / name, size=size, channels=channels))
            places.append(place)
        except UnreadableImage as error:
            unread.append(LeftOut(name, error.reason))
    return pixels, places, unread
