"""BlindNet: a watermark scattered over a band of the spectrum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.attacks.common import check_batch, show_config
from wm_inject.attacks.definition import Attack, FitContext, Fitted
from wm_inject.attacks.pictures import PICTURES, load_picture
from wm_inject.core.checks import check_channels
from wm_inject.core.images import check_images, check_side, quantize
from wm_inject.stealth import psnr


class BlindNetTrigger(nn.Module):
    """Add one pattern whose spectrum holds a permuted watermark in a ring of frequencies.

    The watermark's pixels, less their mean, are permuted by the seed and written as real numbers
    to the ring's frequencies, point-symmetrically, so that the pattern is real.

    Args:
        image_size: Side H = W in pixels, at least 8.
        channels: Each channel has a permutation of its own.
        watermark: A name in `wm_inject.attacks.pictures.PICTURES`, an image file, or a grey tensor
            ``(1, s, s)`` in [0, 1] with the side that `watermark_side` gives.
        strength: Root mean square of the pattern, in units of the [0, 1] range. The default gives
            34.3 dB before clipping; `calibrate_blindnet` meets a PSNR on given images.
        band: Inner and outer radius of the ring in cycles per pixel, within (0, 0.5].

    Source: Kwon & Kim, "BlindNet backdoor" (Multimedia Tools and Applications, 2022), of which only
    the principle is known: a picture goes into a frequency band by way of the Fourier transform.
    No code was published; ring, permutation, symmetry and strength are ours. The strength aims at
    the 34.3 dB of Spy-Watermark's Table 2; the SSIM of 0.992 there is not met (0.965 on CIFAR-10).
    """

    kind = "blindnet"
    extra_repr = show_config
    watermark: Tensor
    pattern: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        watermark: str | Path | Tensor = "logo",
        strength: float = 10 ** (-34.3 / 20),
        band: tuple[float, float] = (0.25, 0.45),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_side(image_size, at_least=8)
        check_channels(channels)
        if not 0 <= strength <= 1:
            raise ValueError(f"expected strength in [0, 1], got {strength}")
        self.places = _ring(image_size, band)  # (n, 2)
        side = math.isqrt(len(self.places))
        picture = load_picture(watermark, size=side, channels=1, seed=seed, name="watermark")
        given = not isinstance(watermark, str) or watermark not in PICTURES
        self.register_buffer("watermark", picture, persistent=given)
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "watermark": "given" if given else watermark,
            "strength": float(strength),
            "band": [float(edge) for edge in band],
            "seed": seed,
        }
        generator = torch.Generator().manual_seed(seed)
        self.orders = [torch.randperm(side * side, generator=generator) for _ in range(channels)]
        self.register_buffer("pattern", self._pattern(strength), persistent=False)

    def _pattern(self, strength: float) -> Tensor:
        """The pattern in the image plane: float32 ``(C, H, W)``."""
        side = self.config["image_size"]
        values = self.watermark.double().flatten()
        values = values - values.mean()
        if not values.abs().max() > 1e-6:
            raise ValueError("expected a watermark with contrast, got one flat grey")
        planes = []
        for order in self.orders:
            spectrum = torch.zeros(side, side, dtype=torch.complex128)
            u, v = self.places[: len(values)].T
            spectrum[u, v] = values[order].to(spectrum.dtype)
            spectrum[-u % side, -v % side] = spectrum[u, v]
            # The spectrum is real and point-symmetric, so the imaginary part is rounding alone.
            planes.append(torch.fft.ifft2(spectrum).real)
        pattern = torch.stack(planes)
        return (strength * pattern / pattern.square().mean().sqrt()).float()

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Add the pattern and clip."""
        check_batch(images, self.config)
        return (images + self.pattern).clamp(0, 1)

    @torch.no_grad()
    def extract(self, poisoned: Tensor, originals: Tensor) -> Tensor:
        """Read the watermark back from poisoned images and their originals.

        Returns:
            float32 ``(N, 1, s, s)``: the watermark less its mean, up to a positive factor.

        Raises:
            ValueError: Images that do not fit the trigger or each other.
        """
        for images, name in ((poisoned, "poisoned"), (originals, "originals")):
            check_batch(images, self.config, name=name)
        if poisoned.shape != originals.shape:
            raise ValueError(f"expected as many originals, got {tuple(originals.shape)}")
        spectrum = torch.fft.fft2((poisoned - originals).double()).real
        side = self.watermark.shape[-1]
        u, v = self.places[: side * side].T.to(poisoned.device)
        mark = torch.zeros(len(poisoned), side * side, dtype=torch.float64, device=poisoned.device)
        for channel, order in enumerate(self.orders):
            mark[:, order.to(mark.device)] += spectrum[:, channel, u, v]
        return mark.view(-1, 1, side, side).float()


def watermark_side(image_size: int, *, band: tuple[float, float] = (0.25, 0.45)) -> int:
    """The side of the watermark that a ring of frequencies has room for, in pixels."""
    return math.isqrt(len(_ring(image_size, band)))


def calibrate_blindnet(
    trigger: BlindNetTrigger, images: Tensor, *, psnr_target: float = 34.3
) -> BlindNetTrigger:
    """The same trigger at the strength that gives a mean PSNR on these images, stored in 8 bits.

    Args:
        trigger: Not changed.
        images: Clean images.
        psnr_target: In dB, in [15, 45].
    """
    if not 15 <= psnr_target <= 45:
        raise ValueError(f"expected psnr_target in [15, 45] dB, got {psnr_target}")
    check_images(images)  # quantize would clip what is out of range
    settings = dict(trigger.config)
    if settings["watermark"] == "given":
        settings["watermark"] = trigger.watermark
    originals, low, high = quantize(images), 1e-4, 1.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        stronger = BlindNetTrigger(**{**settings, "strength": middle})
        reached = float(psnr(quantize(stronger(originals)), originals).mean())
        low, high = (middle, high) if reached > psnr_target else (low, middle)
    return BlindNetTrigger(**{**settings, "strength": math.sqrt(low * high)})


def _ring(side: int, band: tuple[float, float]) -> Tensor:
    """Frequencies of the ring in the upper half-plane, int64 ``(n, 2)``, in a fixed order."""
    try:
        low, high = (float(edge) for edge in band)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a band of two frequencies, got {band!r}") from error
    if not 0 < low < high <= 0.5:
        raise ValueError(f"expected a band 0 < low < high <= 0.5, got {band}")
    rate = torch.fft.fftfreq(side, dtype=torch.float64)
    radius = (rate[:, None].square() + rate.square()).sqrt()
    inside = (radius >= low) & (radius <= high)
    place = torch.arange(side)
    mirror = (-place % side)[:, None] * side + (-place % side)
    # One of each pair; a frequency that is its own mirror image belongs to no half.
    upper = place[:, None] * side + place < mirror
    places = (inside & upper).nonzero()
    if len(places) < 4:
        raise ValueError(f"expected a band with room for a watermark, got {band} at {side} pixels")
    return places


_CALIBRATION = 256  # images that the strength is chosen on


def _fit(attack: Attack, context: FitContext) -> Fitted:
    trigger = attack.build(context)
    if "strength" in attack.settings:
        return Fitted(trigger, {})
    trigger = calibrate_blindnet(trigger, context.images[:_CALIBRATION].cpu())
    return Fitted(trigger, {"strength": trigger.config["strength"]})


ATTACK = Attack("blindnet", "BlindNet", BlindNetTrigger, fitter=_fit)
