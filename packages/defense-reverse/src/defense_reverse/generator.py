"""The generator of backdoor images: a U-Net from images to images.

Source: Zheng, Hua and Zhang, "Detecting and Mitigating Backdoor Attacks with Dynamic and Invisible
Triggers", section 3.3. The paper names U-Net and gives no width, depth, normalisation or output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_images, pad_to_multiple

# The image enters the head with this slope: black and white start at sigmoid(-4) and sigmoid(4).
_SLOPE = 8.0


class UNetGenerator(nn.Module):
    """Map images to images of the same shape, in [0, 1].

    There is no normalisation layer. With batch statistics an image's output would depend on the
    rest of its batch while training, and differ from what is exported afterwards; a network this
    shallow trains without. Skips concatenate, and the outermost skip is the image itself, so that
    a fresh generator nearly copies: otherwise mostly black images drive the sigmoid into
    saturation in the first steps, where it stays.

    Args:
        channels: 1 (grey) or 3 (RGB).
        width: Channels of the first level; each level below has twice as many.
        depth: How often the sides are halved; others than multiples of 2**depth are padded inside.
        convs: 3x3 convolutions per block.
        residual: Output ``images + tanh(change)``, clamped, with a change of zero at the start,
            in place of a sigmoid.
        picture_size: Side of a picture that is learned beside the U-Net and added to its output,
            zero at the start; None for none. A U-Net answers alike wherever it sees the same
            surroundings, so that by itself it cannot draw a fixed picture, as many triggers are.
            With one, images must have this side.
    """

    kind = "unet-generator"

    def __init__(
        self,
        *,
        channels: int,
        width: int = 16,
        depth: int = 2,
        convs: int = 1,
        residual: bool = False,
        picture_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_channels(channels)
        for name, value, most in (("width", width, 256), ("depth", depth, 5), ("convs", convs, 4)):
            if not 1 <= value <= most:
                raise ValueError(f"expected {name} in 1 .. {most}, got {value}")
        if picture_size is not None and not 1 <= picture_size <= 1024:
            raise ValueError(f"expected picture_size in 1 .. 1024 or None, got {picture_size}")
        self.config: dict[str, Any] = {
            "channels": channels,
            "width": width,
            "depth": depth,
            "convs": convs,
            "residual": residual,
            "picture_size": picture_size,
        }
        self.depth, self.residual = depth, residual
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _block(before, after, convs)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.raise_ = nn.ModuleList(
            skip_init(nn.ConvTranspose2d, 2 * level, level, 2, stride=2) for level in widths[-2::-1]
        )
        self.up = nn.ModuleList(_block(2 * level, level, convs) for level in widths[-2::-1])
        self.head = skip_init(nn.Conv2d, width + channels, channels, 1)
        self.picture: nn.Parameter | None = None
        if picture_size is not None:
            self.picture = nn.Parameter(torch.zeros(channels, picture_size, picture_size))
        self._start(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _start(self, generator: torch.Generator) -> None:
        """Fill every layer as torch would, from a generator of our own; make the head a copier."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_in = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
                if isinstance(layer, nn.ConvTranspose2d):
                    fan_in = layer.in_channels  # stride 2, kernel 2: one tap per output pixel
                bound = fan_in**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                assert layer.bias is not None
                layer.bias.uniform_(-bound, bound, generator=generator)
        channels = self.config["channels"]
        if self.residual:
            self.head.weight.zero_()
            self.head.bias.zero_()
            return
        self.head.weight[:, :-channels] *= 0.1
        self.head.weight[:, -channels:] = _SLOPE * torch.eye(channels)[:, :, None, None]
        self.head.bias.fill_(-_SLOPE / 2)

    def forward(self, images: Tensor) -> Tensor:
        """Generate one image from each: ``(N, C, H, W)`` in [0, 1], the same shape."""
        side = self.config["picture_size"]
        size = None if side is None else (side, side)
        check_images(images, channels=self.config["channels"], size=size)
        return self.transform(images)

    def transform(self, images: Tensor) -> Tensor:
        """As `forward`, for loops that have checked their images and for `torch.vmap`."""
        height, width = images.shape[2:]
        x = padded = pad_to_multiple(images, 2**self.depth)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))  # (N, width * 2**l, H / 2**l, ..)
            skips.append(x)
        for raise_, block, skip in zip(self.raise_, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, raise_(x)], dim=1))
        x = self.head(torch.cat([x, padded], dim=1))[..., :height, :width]  # (N, C, H, W)
        if self.picture is not None:
            x = x + self.picture
        if self.residual:
            return (images + torch.tanh(x.float())).clamp(0, 1)
        return torch.sigmoid(x.float())


def _block(before: int, after: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convs):
        layers.append(skip_init(nn.Conv2d, after if index else before, after, 3, padding=1))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
