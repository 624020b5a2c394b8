"""Spy-Watermark: a trained injector with its watermark, as a trigger like any other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wm_inject.attacks.definition import Attack
from wm_inject.core.images import check_images, resized
from wm_inject.watermark.picture import check_watermark, default_watermark
from wm_inject.watermark.pretrained import read_pretrained
from wm_inject.watermark.vit import ViTInjector


class WatermarkTrigger(nn.Module):
    """Hide one fixed watermark in every image.

    Args:
        injector: The trained injector; None builds a fresh one from ``injector_config``.
        watermark: float32 ``(1, H, W)`` in [0, 1]; the default picture if None.
        strength: Gain on the change x' - x at poisoning time; 1 is what was trained.
        injector_config: Settings of `ViTInjector`, needed where ``injector`` is None.

    Raises:
        ValueError: A negative strength, a watermark of another size, or nothing to build from.

    Source: Wang et al., "Spy-Watermark", section 2.2. The gain is ours.
    """

    kind = "watermark"
    watermark: Tensor

    def __init__(
        self,
        injector: ViTInjector | None = None,
        *,
        watermark: Tensor | None = None,
        strength: float = 1.0,
        injector_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if injector is None and injector_config is None:
            raise ValueError("expected an injector or its settings, got neither")
        if strength < 0:
            raise ValueError(f"expected strength >= 0, got {strength}")
        self.injector = injector if injector is not None else ViTInjector(**(injector_config or {}))
        size = self.injector.image_size
        mark = default_watermark(size) if watermark is None else watermark
        self.register_buffer("watermark", check_watermark(mark, size=size).clone())
        self.strength = float(strength)
        self.config: dict[str, Any] = {
            "injector_config": dict(self.injector.config),
            "strength": self.strength,
        }
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str) -> WatermarkTrigger:
        """A trained injector that ships with this package, and the watermark it was trained with.

        Its extractor is `wm_extract.MarkDetector.from_pretrained` of the same name.

        Args:
            name: One of `wm_inject.PRETRAINED`, such as "tiny-32".

        Raises:
            ValueError: No weights of this name.
            CheckpointError: The file is not the one that was shipped.
        """
        saved = read_pretrained(name, kind=cls.kind)
        trigger = cls(**saved.config)
        trigger.load_state_dict(saved.state)
        return trigger

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Hide the watermark in images of any size.

        The change is made at the injector's size and enlarged: see
        `wm_inject.core.whole_pictures`, which does the same to files.
        """
        side, whole = self.injector.image_size, images
        check_images(whole, channels=self.injector.channels)
        images = resized(whole, (side, side)).clamp(0, 1)  # resizing rounds
        change = self.strength * (self.injector(images, self.watermark) - images)
        return (whole + resized(change, (whole.shape[2], whole.shape[3]))).clamp(0, 1)


# Injector and extractor are trained together, which takes wm-extract.
ATTACK = Attack("watermark", "Spy-Watermark", WatermarkTrigger, needs="extractor")
