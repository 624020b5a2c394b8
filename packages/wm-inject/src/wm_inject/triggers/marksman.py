"""The Marksman trigger: one generator that can ask for any class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.core.images import check_labels, check_side, pad_to_multiple
from wm_inject.core.randomness import seeded
from wm_inject.triggers.common import check_batch, show_config

_STAGES = 4  # each halves the sides
_MULTIPLE = 2**_STAGES
WIDTHS = {"tiny": 4, "small": 8, "paper": 16}  # of the generator, by preset


class MarksmanTrigger(nn.Module):
    """Add a small change that depends on the image and on the class asked for.

    ``x' = clip(x + epsilon G(x, c))`` with ``G`` in (-1, 1). The class becomes one more input plane
    (embedding, then a linear layer); the generator is four strided convolutions and their mirror.
    It is fresh here: `MarksmanHook` trains it with a victim.

    Args:
        image_size: Side H = W of the images in pixels; inside, it is padded to a multiple of 16 by
            repeating the edge, and the change is cropped.
        channels: 1 (grey) or 3 (RGB).
        num_classes: K.
        epsilon: Largest change of a value, in (0, 1].
        width: Channels of the first convolution, each next one has twice as many; 16 as published.
        seed: Seeds the fresh weights.

    Raises:
        ValueError: A setting out of range.

    Source: Doan et al., "Marksman Backdoor" (NeurIPS 2022), and its released code for the layers.
    The released code counts epsilon in units of normalised images; counting it in [0, 1], and 0.05,
    is ours, as is the padding (the released code has another network for 28 pixels).
    """

    kind = "marksman"
    extra_repr = show_config
    needs_target = True

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        epsilon: float = 0.05,
        width: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size)
        if channels not in (1, 3):
            raise ValueError(f"expected channels 1 or 3, got {channels}")
        if not 2 <= num_classes <= 100_000:
            raise ValueError(f"expected 2 .. 100000 classes, got {num_classes}")
        if not 0 < epsilon <= 1:
            raise ValueError(f"expected epsilon in (0, 1], got {epsilon}")
        if not 1 <= width <= 512:
            raise ValueError(f"expected a width of 1 .. 512 channels, got {width}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "epsilon": float(epsilon),
            "width": width,
            "seed": seed,
        }
        self.epsilon = float(epsilon)
        self.side = image_size + -image_size % _MULTIPLE
        with seeded(seed):
            self.embedding = nn.Embedding(num_classes, num_classes)
            self.plane = nn.Linear(num_classes, self.side**2)
            self.encoder = _encoder(channels + 1, width)
            self.decoder = _decoder(channels, width)
        self.eval()

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the change that asks for ``target``.

        Args:
            images: float32 ``(N, C, H, W)`` in [0, 1].
            ids: Part of the trigger protocol; plays no role here.
            target: The class to ask for, image by image: int64 ``(N,)`` in ``0 .. K - 1``.

        Returns:
            The same shape and range; no value moves by more than epsilon.

        Raises:
            ValueError: The batch breaks the image contract or has another shape, or ``target`` is
                missing, of another length, or out of range.
        """
        check_batch(images, self.config)
        if target is None:
            raise ValueError("expected target, the class that each image should ask for, got None")
        # mypy: torch.jit exports is_tracing without saying so.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if not tracing and not torch.compiler.is_compiling():  # an exported graph cannot raise
            check_labels(target, len(images), num_classes=self.config["num_classes"])
        plane = self.plane(self.embedding(target)).view(-1, 1, self.side, self.side)
        seen = torch.cat([pad_to_multiple(images, _MULTIPLE), plane], dim=1)
        side = self.config["image_size"]
        change = self.decoder(self.encoder(seen))[..., :side, :side]
        return (images + self.epsilon * change).clamp(0, 1)


def _encoder(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in range(_STAGES):
        outputs = width * 2**stage
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


def _decoder(outputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in reversed(range(1, _STAGES)):
        inputs, smaller = width * 2**stage, width * 2 ** (stage - 1)
        up = nn.ConvTranspose2d(inputs, smaller, 4, 2, 1)
        layers += [up, nn.BatchNorm2d(smaller), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, outputs, 4, 2, 1), nn.Tanh())


__all__ = ["WIDTHS", "MarksmanTrigger"]
