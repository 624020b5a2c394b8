"""A trigger that FeatureRE reversed: a generator, and the features that it takes over."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from defense_reverse.generator import UNetGenerator


class FeatureTrigger(nn.Module):
    """A generator reversed by FeatureRE, and the mask of the features that it takes over.

    Args:
        generator: Images to backdoor images.
        mask: The shape of one image's features, in [0, 1].
        target: The label it was made for.
        score: Its score; below the threshold it is a backdoor's.
        success_rate: Share of other classes' images that it sends to the label, with no mask.
        residual_norm: Mean absolute change, per pixel and channel, of those images.

    Raises:
        ValueError: A number or a mask outside its range.
    """

    kind = "feature-re"
    mask: Tensor

    def __init__(
        self,
        generator: UNetGenerator,
        mask: Tensor,
        *,
        target: int,
        score: float = 0.0,
        success_rate: float = 0.0,
        residual_norm: float = 0.0,
    ) -> None:
        super().__init__()
        if target < 0 or not 0 <= success_rate <= 1 or not 0 <= residual_norm <= 1:
            raise ValueError(
                "expected a target >= 0 and a success rate and residual in [0, 1], got "
                f"{target}, {success_rate}, {residual_norm}"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("expected a mask with finite values in [0, 1]")
        self.generator = generator
        self.register_buffer("mask", mask)
        self.target, self.score = target, score
        self.success_rate, self.residual_norm = success_rate, residual_norm
        self.eval()

    @property
    def config(self) -> dict[str, Any]:
        """What this trigger is, ready for JSON."""
        return {
            "generator": dict(self.generator.config),
            "mask": list(self.mask.shape),
            "target": self.target,
            "score": self.score,
            "success_rate": self.success_rate,
            "residual_norm": self.residual_norm,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Generated images, the same shape, in [0, 1]; ``ids`` and ``target`` change nothing.

        Raises:
            ValueError: Images that break the image contract or have other channels.
        """
        return self.generator(images)
