"""The trigger: every image has a pattern and a mask of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_side, pad_to_multiple
from wm_inject.core.randomness import seeded

WIDTHS = {"tiny": 4, "small": 8, "paper": 32}  # of both generators, by preset


class InputAwareTrigger(nn.Module):
    """Put a pattern made from the image itself where a mask made from the image itself says.

    ``x' = x + (p - x) m`` with a pattern ``p = G(x)`` and a mask ``m`` in [0, 1] of a second
    generator. `fit_masks` trains the mask's (phase A), `InputAwareHook` the pattern's, with a
    victim (phase B).

    Args:
        image_size: Side H = W in pixels, padded inside to a multiple of 2**stages.
        width: Channels of the first stage, each next one has twice as many; 32 as published for
            colour, 16 with two stages for MNIST.
        density: Mask values that phase A does not penalise, in [0, 1); about the share of changed
            pixels.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack" (NeurIPS 2020), and its released
    code. The padding is ours.
    """

    kind = "input-aware"
    extra_repr = show_config

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        width: int = 32,
        stages: int = 3,
        density: float = 0.032,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size)
        check_channels(channels)
        if not 1 <= width <= 512:
            raise ValueError(f"expected a width of 1 .. 512 channels, got {width}")
        if not 1 <= stages <= 5:
            raise ValueError(f"expected 1 .. 5 stages, got {stages}")
        if not 0 <= density < 1:
            raise ValueError(f"expected a mask density in [0, 1), got {density}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "width": width,
            "stages": stages,
            "density": float(density),
            "seed": seed,
        }
        with seeded(seed):
            self.pattern_net = _autoencoder(channels, channels, width=width, stages=stages)
            self.mask_net = _autoencoder(channels, 1, width=width, stages=stages)
        self.eval()

    def pattern(self, images: Tensor) -> Tensor:
        """The images' own patterns, of their shape and range."""
        return self._generate(self.pattern_net, images)

    def mask(self, images: Tensor) -> Tensor:
        """Where the images' own triggers lie: float32 ``(N, 1, H, W)`` in [0, 1]."""
        return (20 * self._generate(self.mask_net, images) - 10).tanh() / 2 + 0.5

    def stamp(self, hosts: Tensor, sources: Tensor) -> Tensor:
        """Put the triggers of ``sources`` on ``hosts``, two batches of one shape.

        Raises:
            ValueError: A batch does not fit the trigger, or their shapes differ.
        """
        self._check(hosts)
        if hosts.shape != sources.shape:
            raise ValueError(
                f"expected two batches of one shape, got {tuple(hosts.shape)} "
                f"and {tuple(sources.shape)}"
            )
        return self.blend(hosts, self.pattern(sources), self.mask(sources))

    @staticmethod
    def blend(hosts: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
        """``x + (p - x) m``, within [0, 1]; shapes as `pattern` and `mask` give them."""
        return (hosts + (patterns - hosts) * masks).clamp(0, 1)

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Give every image its own trigger."""
        return self.stamp(images, images)

    def _check(self, images: Tensor) -> None:
        check_batch(images, self.config)

    def _generate(self, net: nn.Module, images: Tensor) -> Tensor:
        self._check(images)
        side = self.config["image_size"]
        raw = net(pad_to_multiple(images, 2 ** self.config["stages"]))[..., :side, :side]
        return raw.tanh() / 2 + 0.5


class _Double(nn.Module):
    """Twice as large, bilinearly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _autoencoder(inputs: int, outputs: int, *, width: int, stages: int) -> nn.Sequential:
    """Pairs of convolutions, down by pooling and up by interpolation; no skip connections."""
    layers: list[nn.Module] = []
    widths = [width * 2**stage for stage in range(stages)]
    now = inputs
    for wide in widths:
        layers += [*_block(now, wide), *_block(wide, wide), nn.MaxPool2d(2)]
        now = wide
    layers += _block(now, now)
    for narrow in [*reversed(widths[:-1]), outputs]:
        layers += [_Double(), *_block(now, now), *_block(now, narrow)]
        now = narrow
    return nn.Sequential(*layers[:-1])  # what comes out is not cut off at zero


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return [convolution, nn.BatchNorm2d(outputs, momentum=0.05), nn.ReLU()]
