"""The Blend trigger: a picture mixed into the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_inject.core.images import check_side
from wm_inject.pictures import PICTURES, load_picture
from wm_inject.triggers.common import check_batch, show_config


class BlendTrigger(nn.Module):
    """Mix one picture into every image: ``(1 - alpha) x + alpha t``.

    Args:
        image_size: Side H = W of the images in pixels.
        channels: 1 (grey) or 3 (RGB).
        alpha: Weight of the picture in [0, 1].
        picture: "noise" (uniform noise from ``seed``), "cartoon" or another name of
            `wm_inject.pictures.PICTURES`, the path of an image file (resized to ``H`` x ``H``,
            whatever its aspect), or a float32 tensor ``(C, H, H)`` in [0, 1].
        seed: Seeds a drawn picture.

    Raises:
        ValueError: A size, weight or picture out of range.

    Source: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
    (2017), blended injection. The cartoon that benchmarks blend in is not shipped; ours is drawn.
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
        if channels not in (1, 3):
            raise ValueError(f"expected channels 1 or 3, got {channels}")
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
        """Blend the picture in: float32 ``(N, C, H, W)`` in [0, 1] to the same shape and range.

        ``ids`` and ``target`` are part of the trigger protocol and play no role here.

        Raises:
            ValueError: The batch breaks the image contract or has another shape.
        """
        check_batch(images, self.config)
        blended = (1 - self.alpha) * images + self.alpha * self.picture
        # Exact arithmetic never leaves [0, 1]; rounding may, by one unit in the last place.
        return blended.clamp(0, 1)
