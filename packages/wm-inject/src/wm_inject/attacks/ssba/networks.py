"""Encoder, decoder and trigger: a fixed bit string, hidden in every image."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.core.images import check_images, check_side, pad_to_multiple

PLANE = 16  # side of the plane that the secret becomes before it is enlarged to the image
_OUTPUTS = ("residual", "image")
_LIMITS = {"bits": 4096, "width": 256}  # a settings file must not be able to ask for all memory


class SsbaEncoder(nn.Module):
    """A U-shaped network that hides bits in images.

    The secret becomes a 16 x 16 plane for each channel, enlarged by whole pixels to the image and
    stacked on it. Sides are padded to a multiple of 16.

    Args:
        image_size: Side H = W in pixels, at least 8.
        width: Channels of the first convolution; the others are 1, 2, 4 and 8 times as wide.
        output: "residual" adds the network's output to the image; "image" makes the whole image,
            through a sigmoid.

    Source: the encoder of Tancik et al., "StegaStamp" (CVPR 2020), in BackdoorBench's layout (with
    100 bits and width 32 at 32 pixels, its 1 069 315 weights). Inputs are shifted by -0.5 for a
    residual, as in StegaStamp, not for a whole image, as in BackdoorBench. Padding and grey images
    are ours.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        bits: int = 100,
        width: int = 32,
        output: Literal["residual", "image"] = "residual",
    ) -> None:
        super().__init__()
        check_steganography(image_size, channels, bits, width)
        if output not in _OUTPUTS:
            raise ValueError(f"expected output in {', '.join(_OUTPUTS)}, got {output!r}")
        self.shape = (channels, image_size, image_size)
        self.output = output
        w, stacked = width, 2 * channels
        self.secret = nn.Linear(bits, channels * PLANE**2)
        self.first = nn.Conv2d(stacked, w, 3, padding=1)
        wide = [w, w, 2 * w, 4 * w, 8 * w]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(wide)
        )
        # Each way up: enlarge, narrow by a 2 x 2 convolution, join the same scale's features.
        narrow, joined = [4 * w, 2 * w, w, w], [4 * w, 2 * w, w, w + stacked]
        self.up = nn.ModuleList(nn.Conv2d(a, b, 2) for a, b in pairwise([8 * w, *narrow]))
        self.join = nn.ModuleList(
            nn.Conv2d(b + more, b, 3, padding=1) for b, more in zip(narrow, joined, strict=True)
        )
        self.refine = nn.Conv2d(w, w, 3, padding=1)
        self.last = nn.Conv2d(w, channels, 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Hide secrets: ``(N, C, H, W)`` in [0, 1] and bits ``(N, B)`` to ``(N, C, H, W)``.

        One secret ``(1, B)`` serves all images. A residual may leave [0, 1]; clamp the sum.
        """
        channels, side, _ = self.shape
        x = pad_to_multiple(images, PLANE)  # (N, C, S, S)
        centre = 0.5 if self.output == "residual" else 0.0
        plane = F.relu(self.secret(secrets - centre)).reshape(-1, channels, PLANE, PLANE)
        plane = F.interpolate(plane, scale_factor=float(-(-side // PLANE)), mode="nearest")
        stacked = torch.cat([plane.expand(x.shape[0], -1, -1, -1), x - centre], dim=1)
        skips = [F.relu(self.first(stacked))]  # (N, w, S, S)
        for convolution in self.down:
            skips.append(F.relu(convolution(skips[-1])))
        features = skips.pop()  # (N, 8w, S / 16, S / 16)
        skips[0] = torch.cat([skips[0], stacked], dim=1)
        for up, join, skip in zip(self.up, self.join, reversed(skips), strict=True):
            enlarged = F.interpolate(features, scale_factor=2.0, mode="nearest")
            features = F.relu(up(F.pad(enlarged, (0, 1, 0, 1))))
            features = F.relu(join(torch.cat([skip, features], dim=1)))
        change = self.last(F.relu(self.refine(features)))[..., :side, :side]  # (N, C, H, W)
        return images + change if self.output == "residual" else change.sigmoid()


class SsbaDecoder(nn.Module):
    """A convolutional network that reads the bits back; arguments as those of `SsbaEncoder`.

    Source: the decoder of StegaStamp in BackdoorBench's layout, without StegaStamp's spatial
    transformer. With 100 bits and width 32 at 32 pixels it has BackdoorBench's 441 284 weights.
    """

    def __init__(self, *, image_size: int, channels: int, bits: int = 100, width: int = 32) -> None:
        super().__init__()
        check_steganography(image_size, channels, bits, width)
        self.shape = (channels, image_size, image_size)
        w = width
        # (output channels, stride) of each 3 x 3 convolution
        layers = [(w, 2), (w, 1), (2 * w, 2), (2 * w, 1), (2 * w, 2), (4 * w, 2), (4 * w, 2)]
        self.body, before = nn.ModuleList(), channels
        for after, stride in layers:
            self.body.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
            before = after
        side = (-(-image_size // PLANE) + 1) // 2  # after five strides of 2
        self.hidden = nn.Linear(before * side**2, 16 * w)
        self.last = nn.Linear(16 * w, bits)

    def forward(self, images: Tensor) -> Tensor:
        """Read the bits: ``(N, C, H, W)`` in [0, 1] to logits ``(N, B)``; above 0 is a one."""
        x = check_images(images, channels=self.shape[0], size=self.shape[1:])
        x = pad_to_multiple(x, PLANE)
        for convolution in self.body:
            x = F.relu(convolution(x))
        return self.last(F.relu(self.hidden(x.flatten(1))))


class SsbaTrigger(nn.Module):
    """Hide one fixed bit string in every image; the change differs from image to image.

    Its encoder is untrained; `fit_ssba` trains one. ``secret_seed`` seeds the secret, the other
    arguments are those of `SsbaEncoder`.

    Source: Li et al., "Invisible Backdoor Attack with Sample-Specific Triggers" (ICCV 2021). The
    authors hide seven ASCII characters with their error-correcting code; our bits are random.
    """

    kind = "ssba"
    extra_repr = show_config
    secret: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        bits: int = 100,
        secret_seed: int = 0,
        width: int = 32,
        output: Literal["residual", "image"] = "residual",
    ) -> None:
        super().__init__()
        self.encoder = SsbaEncoder(
            image_size=image_size, channels=channels, bits=bits, width=width, output=output
        )
        generator = torch.Generator().manual_seed(secret_seed)
        self.register_buffer("secret", torch.randint(2, (1, bits), generator=generator).float())
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "bits": bits,
            "secret_seed": secret_seed,
            "width": width,
            "output": output,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Hide the secret."""
        check_batch(images, self.config)
        return self.encoder(images, self.secret).clamp(0, 1)


def check_steganography(image_size: int, channels: int, bits: int, width: int) -> None:
    """Check the settings that encoder and decoder share."""
    check_side(image_size, at_least=8)
    if channels not in (1, 3):
        raise ValueError(f"expected channels 1 or 3, got {channels}")
    for name, value in (("bits", bits), ("width", width)):
        if not isinstance(value, int) or not 1 <= value <= _LIMITS[name]:
            raise ValueError(f"expected {name} in 1 .. {_LIMITS[name]}, got {value!r}")
