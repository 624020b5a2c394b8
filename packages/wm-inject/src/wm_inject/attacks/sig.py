"""SIG: a faint sine wave across the columns, in images of the target class only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack
from wm_inject.core.images import check_side


class SigTrigger(nn.Module):
    """Add ``amplitude * sin(2 pi j frequency / W)`` to column j of every channel, and clip.

    Args:
        amplitude: Peak of the wave in [0, 1]; 40/255 is the strong setting, 20/255 the faint one.
        frequency: Periods per image *width*, above 0 and below H / 2. A large image therefore
            gets a slow wave.

    Source: Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
    Poisoning" (ICIP 2019), with BackdoorBench's amplitude and frequency.
    """

    kind = "sig"
    extra_repr = show_config
    wave: Tensor

    def __init__(
        self, *, image_size: int, amplitude: float = 40 / 255, frequency: float = 6
    ) -> None:
        super().__init__()
        check_side(image_size, at_least=3)
        if not 0 <= amplitude <= 1:
            raise ValueError(f"expected amplitude in [0, 1], got {amplitude}")
        if not 0 < frequency < image_size / 2:
            raise ValueError(
                f"expected a frequency above 0 and below {image_size / 2:g} periods per width, "
                f"got {frequency}"
            )
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "amplitude": float(amplitude),
            "frequency": frequency,
        }
        # In double precision, so that whole frequencies sum to zero as nearly as float32 allows.
        column = torch.arange(image_size, dtype=torch.float64)
        wave = amplitude * torch.sin(2 * math.pi * frequency / image_size * column)
        self.register_buffer("wave", wave.float())  # (W,)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the wave."""
        check_batch(images, self.config)
        return (images + self.wave).clamp(0, 1)


ATTACK = Attack("sig", "SIG", SigTrigger, label_map="clean-label", ratio=0.5)
