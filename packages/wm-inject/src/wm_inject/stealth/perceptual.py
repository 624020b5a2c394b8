"""LPIPS with its trained weights, or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wm_inject.core.images import check_pair

_LPIPS_FILE = "lpips_alex.safetensors"
_TRUNK_FILE = "alexnet-owt-7be5be79.pth"  # the name torchvision's hub gives it
_LPIPS_SIDE = 32


class LpipsUnavailable(RuntimeError):
    """LPIPS was asked for, and its trained weights or its package are not here."""


class Lpips(nn.Module):
    """Learned perceptual distance (LPIPS 0.1, AlexNet) with its trained weights, frozen.

    Grey images are repeated to three channels. AlexNet takes no image smaller than 31 pixels:
    images with a side below 32 are first enlarged bilinearly to 32, which changes the value.

    Args:
        weights: A safetensors file with the whole state of ``lpips.LPIPS(net="alex")``; found by
            `find_lpips_weights` if None.

    Raises:
        LpipsUnavailable: No weights found, or the lpips package is not installed.
        ValueError: The file is not that state.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (2018), through the authors' package.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = find_lpips_weights() if weights is None else Path(weights)
        if path is None or not path.is_file():
            where = "no weights found" if path is None else f"no file at {path}"
            raise LpipsUnavailable(
                f"LPIPS needs its trained weights, {where}: set WM_LPIPS to a safetensors file of "
                f"lpips.LPIPS(net='alex'), or run torchvision.models.alexnet(weights='DEFAULT') "
                "once where there is a network"
            )
        self.net = _load_lpips(path)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stay in evaluation mode: the package's heads have dropout."""
        return super().train(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """The distance of each pair; gradients flow to both.

        Returns:
            float32 ``(N,)``, at least 0.

        Raises:
            ValueError: Bad or differently shaped images.
        """
        check_pair(images, reference)
        distance: Tensor = self.net(_lpips_input(images), _lpips_input(reference))  # (N, 1, 1, 1)
        return distance.flatten()


def find_lpips_weights() -> Path | None:
    """Find the weights of LPIPS on this machine; nothing is downloaded.

    Looks at the environment variable WM_LPIPS, at ``lpips_alex.safetensors`` in the folder WM_DATA
    and in torch hub's cache, and at torchvision's AlexNet there (the lpips package brings the
    heads).

    Returns:
        The file, or None.
    """
    places = []
    if os.environ.get("WM_LPIPS"):
        places.append(Path(os.environ["WM_LPIPS"]))
    if os.environ.get("WM_DATA"):
        places.append(Path(os.environ["WM_DATA"]) / _LPIPS_FILE)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places += [cache / _LPIPS_FILE, cache / _TRUNK_FILE]
    return next((place for place in places if place.is_file()), None)


def _load_lpips(path: Path) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise LpipsUnavailable("LPIPS needs its package: install wm-inject[lpips]") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    cached = path.name == _TRUNK_FILE
    # The package draws random weights before it loads any; the caller's draws must not shift.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips still calls torchvision with the arguments of 2022.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        net: nn.Module = lpips.LPIPS(net="alex", pnet_rand=not cached, verbose=False)
    if not cached:
        try:
            net.load_state_dict(load_file(path), strict=True)
        except (SafetensorError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"{path.name} is not the state of LPIPS(net='alex'): {first}"
            ) from error
    return net


def _lpips_input(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if min(images.shape[2:]) < _LPIPS_SIDE:
        size = [max(side, _LPIPS_SIDE) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images * 2 - 1
