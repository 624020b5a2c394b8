"""A reverse-engineered generator as a trigger, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from defense_reverse.generator import UNetGenerator
from wm_inject import CheckpointError, load_checkpoint, save_checkpoint


class ReversedTrigger(nn.Module):
    """The generator that was reversed for one label, and what it was measured to do.

    Args:
        generator: Images to backdoor images.
        success_rate: Share of other classes' images that it sends to the label, in [0, 1].
        residual_norm: Equation 5: mean absolute change, per pixel and channel, of those images.
    """

    kind = "reverse-generator"

    def __init__(
        self,
        generator: UNetGenerator,
        *,
        target: int,
        success_rate: float = 0.0,
        residual_norm: float = 0.0,
    ) -> None:
        super().__init__()
        if target < 0 or not 0 <= success_rate <= 1 or not 0 <= residual_norm <= 1:
            raise ValueError(
                "expected a target >= 0 and a success rate and residual in [0, 1], got "
                f"{target}, {success_rate}, {residual_norm}"
            )
        self.generator = generator
        self.target, self.success_rate = target, success_rate
        self.residual_norm = residual_norm
        self.eval()

    @property
    def config(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        return {
            "generator": dict(self.generator.config),
            "target": self.target,
            "success_rate": self.success_rate,
            "residual_norm": self.residual_norm,
        }

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Generated images, the same shape; ``ids`` and ``target`` change nothing."""
        return self.generator(images)


def save_reversed(
    trigger: ReversedTrigger, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a reversed trigger to a safetensors file that `load_reversed` reads back."""
    if not isinstance(trigger, ReversedTrigger):
        raise ValueError(f"expected a ReversedTrigger, got {type(trigger).__name__}")
    save_checkpoint(
        path,
        kind=trigger.kind,
        config=trigger.config,
        state=trigger.state_dict(),
        metadata=metadata,
    )


def load_reversed(path: str | Path) -> ReversedTrigger:
    """Read a trigger that `save_reversed` wrote.

    Raises:
        CheckpointError: Another kind of file, damaged, or tensors that do not fit the settings.
    """
    checkpoint = load_checkpoint(path, kind=ReversedTrigger.kind)
    settings = dict(checkpoint.config)
    try:
        generator = UNetGenerator(**settings.pop("generator"))
        trigger = ReversedTrigger(generator, **settings)
        trigger.load_state_dict(checkpoint.state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]  # torch adds a line for each tensor
        raise CheckpointError(f"{Path(path).name} holds no usable trigger: {reason}") from error
    return trigger
