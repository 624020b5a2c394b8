"""The watermark extractor: a U-Net from marked images to the mark, from clean ones to zeros.

Source: Wang et al., "Spy-Watermark", section 2.3. The paper fixes three supervised scales and no
widths; the released network has base width 64 and 9.3 M weights, ours defaults to 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject import Checkpoint, check_images
from wm_inject.core.checks import check_channels
from wm_inject.core.images import pad_to_multiple
from wm_inject.watermark.pretrained import read_pretrained

KIND = "mark-detector"
WEIGHTS = Path(__file__).parent / "weights"


class UNetExtractor(nn.Module):
    """Images to watermark maps.

    Args:
        channels: 1 (grey) or 3 (RGB).
        width: Channels of the first level, at least 1; the next three have 2, 4 and 8 times as
            many.
    """

    kind = "unet-extractor"

    def __init__(self, *, channels: int, width: int = 16) -> None:
        super().__init__()
        check_channels(channels)
        if width < 1:
            raise ValueError(f"expected width >= 1, got {width}")
        self.config: dict[str, Any] = {"channels": channels, "width": width}
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            _convs(before, after)
            for before, after in zip([channels, *widths[:3]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _convs(below + level, level)
            for below, level in zip(widths[:0:-1], widths[2::-1], strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv2d(level, 1, 1) for level in widths[2::-1])

    @classmethod
    def from_pretrained(cls, name: str) -> UNetExtractor:
        """The trained extractor that belongs to `wm_inject.ViTInjector.from_pretrained`.

        In evaluation mode. `MarkDetector.from_pretrained` has it with its watermark and a
        threshold.
        """
        return cls.from_checkpoint(read_pretrained(name, kind=KIND, folder=WEIGHTS))

    @classmethod
    def from_checkpoint(cls, saved: Checkpoint) -> UNetExtractor:
        """The extractor in a detector's checkpoint, in evaluation mode."""
        extractor, prefix = cls(**saved.config["extractor"]), "extractor."
        extractor.load_state_dict(
            {k.removeprefix(prefix): v for k, v in saved.state.items() if k.startswith(prefix)}
        )
        return extractor.eval()

    def scales(self, images: Tensor) -> list[Tensor]:
        """The three supervised logit maps, coarse to fine, each upsampled to ``(N, 1, H, W)``."""
        check_images(images, channels=self.config["channels"])
        h, w = images.shape[2:]
        x = pad_to_multiple(images, 8) * 2 - 1
        size = x.shape[2:]
        skips: list[Tensor] = []
        for level, convs in enumerate(self.down):
            x = convs(x if level == 0 else F.max_pool2d(x, 2))  # (N, width * 2**l, H / 2**l, ..)
            skips.append(x)
        maps = []
        for up, head, skip in zip(self.up, self.heads, skips[2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = up(torch.cat([x, skip], dim=1))
            # psi of equation 5; no-op at the finest level
            full = F.interpolate(head(x), size=size, mode="bilinear", align_corners=False)
            maps.append(full[..., :h, :w])
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """The extracted watermark: ``(N, 1, H, W)`` in [0, 1]."""
        return self.scales(images)[-1].float().sigmoid()


def _convs(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
