"""Blend: one picture mixed into the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack
from wm_inject.attacks.pictures import PICTURES, load_picture
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_side


class BlendTrigger(nn.Module):
    """Mix one picture into every image: ``(1 - alpha) x + alpha t``.

    Args:
        alpha: Weight of the picture in [0, 1].
        picture: A name in `wm_inject.attacks.pictures.PICTURES`, an image file (resized to
            ``H`` x ``H``, whatever its aspect), or a float32 tensor ``(C, H, H)`` in [0, 1].

    Source: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
    (2017), blended injection; the pictures are ours.
    """

    kind = "blend"
    extra_repr = show_config
    picture: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        alpha: float = 0.2,
        picture: str | Path | Tensor = "noise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size)
        check_channels(channels)
        if not 0 <= alpha <= 1:
            raise ValueError(f"expected alpha in [0, 1], got {alpha}")
        drawn = isinstance(picture, str) and picture in PICTURES
        self.register_buffer(
            "picture", load_picture(picture, size=image_size, channels=channels, seed=seed)
        )
        self.alpha = float(alpha)
        # A picture from a file or tensor travels in the state, not in the settings.
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "alpha": self.alpha,
            "picture": picture if drawn else "given",
            "seed": seed,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Blend the picture in."""
        check_batch(images, self.config)
        blended = (1 - self.alpha) * images + self.alpha * self.picture
        # Exact arithmetic never leaves [0, 1]; rounding may, by one unit in the last place.
        return blended.clamp(0, 1)


ATTACK = Attack("blend", "Blend", BlendTrigger)
