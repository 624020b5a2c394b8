"""Training images on the device if they fit, else on the host, copied batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from wm_victim.datasets import ImageSet

_SHARE = 0.5  # of the device's free memory; the network and its activations need the rest
_CHUNK = 4096  # images compared at once: a comparison of all would need several copies


def pack(images: Tensor) -> Tensor:
    """Images as uint8 if every value is a multiple of 1 / 255; else as they are.

    `unpack` restores them to the bit.
    """
    packed = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        grid = part.mul(255).round_().byte()
        if not torch.equal(unpack(grid), part):
            return images
        packed[start : start + _CHUNK] = grid
    return packed


def unpack(images: Tensor) -> Tensor:
    """Float32 images in [0, 1] from the output of `pack`."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


class ImageStore:
    """Batches of an image set on a device, by index.

    For a GPU images are stored as 8-bit numbers where that loses nothing; the batches are the same
    to the bit. At most ``limit`` bytes of images are kept on the device; if None, half of the free
    memory of a GPU, and everything on other devices.
    """

    def __init__(self, data: ImageSet, device: torch.device, *, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"expected a limit of at least 0 bytes, got {limit}")
        self.device = device
        as_is = device.type != "cuda" and limit is None  # on the CPU: not even a copy
        images = data.images if as_is else pack(data.images)
        self.resident = as_is or images.nbytes <= _room(device, limit)
        self.images = images.to(device if self.resident else "cpu")
        self.labels = data.labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, at the positions ``index`` (int64, on the CPU)."""
        on_device = index.to(self.device, non_blocking=True)  # else each step waits for the last
        images = self.images[on_device if self.resident else index]
        return unpack(images.to(self.device, non_blocking=True)), self.labels[on_device]


def _room(device: torch.device, limit: int | None) -> int:
    if limit is not None:
        return limit
    return int(torch.cuda.mem_get_info(device)[0] * _SHARE)
