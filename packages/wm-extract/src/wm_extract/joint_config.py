"""The settings of joint training, and the recipes of the paper, its code and this project."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from wm_inject.core.checks import check_choice
from wm_inject.core.presets import preset_of

if TYPE_CHECKING:
    from wm_extract.corruptions import Corruption, RandomCorruption
    from wm_inject import ViTInjector

# AdamW's peak rate relative to that of "tiny". At the same rate a "small" injector saturates the
# tanh that limits its change and learns no more (docs/weights.md). "base" and "large" are not
# measured: they continue from "small" as the inverse of the width.
_RATES = {"tiny": 1.0, "small": 0.4, "base": 0.2, "large": 0.075}


@dataclass(frozen=True)
class JointConfig:
    """How injector and extractor are trained; `preset` has the recipes.

    Args:
        recipe: The preset this came from; it goes into every record.
        size: Width of the injector: "tiny", "small", "base" or "large".
        iterations: Optimiser steps.
        batch_size: Images a step.
        optimizer: "sgd" with ``momentum`` at a constant rate (the paper), or "adamw" with a
            warm-up, a cosine to zero, and gradients clipped to norm 1.
        lr: Learning rate. For AdamW, the peak at size "tiny": `peak_lr` lowers it for wider ones.
        momentum: Of SGD.
        warmup: Steps of linear warm-up, for AdamW.
        image_weight: lambda_1 on equation 4.
        mark_weight: lambda_2 on the half of equation 5 that recovers m from x'.
        clean_weight: The same on the half that wants zeros from x.
        epsilon: A change up to this is free in equation 4, in [0, 1] units.
        corruption_probability: p_k of equation 6; 0 turns anti-collapse off.
        corrupt_clean: Corrupt clean images as well before the extractor sees them. Without it,
            the extractor takes the corruption for the mark.
        salt_pepper: Add salt-and-pepper noise to the paper's operations.
        psnr_floor: Least PSNR of every marked image, in dB, enforced by the injector; None
            leaves invisibility to equation 4 alone.
        psnr_start: Where the floor starts; it rises to ``psnr_floor`` over the first 40 % of the
            steps, so that the extractor first learns from a mark that is easy to see.
        max_change: Largest change of any value, in [0, 1] units, enforced by the injector too;
            None leaves it free. It keeps the mark from gathering in one visible corner.
        depth: Encoder blocks.
        decoder_depth: Decoder blocks.
        residual: Add the decoder's output to x instead of reconstructing x.
        extractor_width: Base width of the U-Net.
        luminance: Change all colours alike; needs the residual.
        precision: "float32", or "bfloat16": autocast where the hardware multiplies that fast, and
            float32 elsewhere.
        crop: Least share of width and height, each, that a random crop leaves before the image is
            resized back, one more operation of equation 6; 1 leaves crops out.
        diversity_weight: Weight of the mean squared cosine between the changes of two images.
        forgery_weight: Weight of a loss that wants zeros from an image with the mean of the batch's
            changes, which is what averaging marked images gives away. Both make the mark depend on
            its image.
        ramp: Shares of the steps at which the weights of diversity and forgery begin to grow from
            0, and at which they are reached.
        subtraction: Probability that the extractor is shown a marked image without a part of
            another image's change, or of the batch's mean.
        grey: Take the colours away, as one more operation: a grey picture holds no mark in colour.
        jpeg: Quality, 1 to 95, of a JPEG compression as one more operation; None leaves it out.

    Raises:
        ValueError: A value outside its range.

    Source: section 3.1 of the paper for lr, momentum, batch size, steps and weights. The forgery
    loss and the subtraction are ours, after what "ResGuard" (arXiv 2604.03693, 2026) says of its
    loss of residual specificity and its noise layer of known originals.
    """

    recipe: str = "robust"
    size: str = "tiny"
    iterations: int = 2500
    batch_size: int = 16
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.5
    warmup: int = 100
    image_weight: float = 1.0
    mark_weight: float = 0.1
    clean_weight: float = 0.1
    epsilon: float = 1 / 255
    corruption_probability: float = 0.3
    corrupt_clean: bool = True
    salt_pepper: bool = True
    psnr_floor: float | None = 36.6
    psnr_start: float | None = 26.0
    max_change: float | None = 6 / 255
    depth: int = 6
    decoder_depth: int = 2
    residual: bool = True
    extractor_width: int = 16
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    luminance: bool = field(default=False, metadata={"later": True})
    crop: float = field(default=1.0, metadata={"later": True})
    grey: bool = field(default=False, metadata={"later": True})
    diversity_weight: float = field(default=0.0, metadata={"later": True})
    forgery_weight: float = field(default=0.0, metadata={"later": True})
    ramp: tuple[float, float] = field(default=(0.3, 0.6), metadata={"later": True})
    subtraction: float = field(default=0.0, metadata={"later": True})
    jpeg: int | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        check_choice("a size", self.size, _RATES)
        check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        for name in ("iterations", "batch_size", "warmup", "lr", "extractor_width", "depth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        weights = ("image", "mark", "clean", "diversity", "forgery")
        for name in (*(f"{one}_weight" for one in weights), "epsilon"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        for name in ("psnr_floor", "psnr_start"):
            floor = getattr(self, name)
            if floor is not None and not floor > 0:
                raise ValueError(f"expected {name} > 0 dB, got {floor}")
        if self.max_change is not None and not 0 < self.max_change <= 1:
            raise ValueError(f"expected max_change in (0, 1], got {self.max_change}")
        if not 0 <= self.subtraction <= 1:
            raise ValueError(f"expected subtraction in [0, 1], got {self.subtraction}")
        if len(self.ramp) != 2 or not 0 <= self.ramp[0] <= self.ramp[1] <= 1:
            raise ValueError(f"expected a ramp of two shares in order, got {self.ramp}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"expected crop in (0, 1], got {self.crop}")
        if self.jpeg is not None and not 1 <= self.jpeg <= 95:
            raise ValueError(f"expected jpeg in 1 .. 95, got {self.jpeg}")
        if not 0 <= self.corruption_probability <= 1:
            raise ValueError(
                f"expected corruption_probability in [0, 1], got {self.corruption_probability}"
            )

    @classmethod
    def preset(cls, recipe: str = "robust", **changes: Any) -> JointConfig:
        """The settings of a recipe, with single fields changed.

        Args:
            recipe: "robust" (the default of this project), "paper" (the text to the letter), or
                "released" (the weights, domain and length of the authors' published code, whose
                augmentation of cover images is not reproduced).
            **changes: Fields to change.
        """
        return preset_of(cls, _PRESETS, recipe, **{"recipe": recipe, **changes})

    @property
    def peak_lr(self) -> float:
        """The largest learning rate: for AdamW, ``lr`` scaled for the size."""
        return self.lr * _RATES[self.size] if self.optimizer == "adamw" else self.lr

    def injector(self, *, image_size: int, channels: int) -> ViTInjector:
        """A fresh injector for images of this shape; torch's global generator is used."""
        from wm_inject.watermark.vit import ViTInjector, vit_config

        settings = vit_config(
            self.size,
            image_size=image_size,
            channels=channels,
            depth=self.depth,
            decoder_depth=self.decoder_depth,
            residual=self.residual,
            psnr_floor=self.psnr_floor,
            max_change=self.max_change,
            luminance=self.luminance,
        )
        return ViTInjector(**settings)

    def anti_collapse(self) -> RandomCorruption:
        """The operations of equation 6 with their probability."""
        from wm_extract.corruptions import (
            CropResize,
            GaussianNoise,
            Grey,
            Jpeg,
            RandomCorruption,
            RandomMask,
            Rescale,
            Rotation,
            SaltPepper,
        )

        operations: list[Corruption] = [
            RandomMask("pixel"),
            RandomMask("block"),
            Rotation(),
            GaussianNoise(),
            Rescale(),
        ]
        if self.salt_pepper:
            operations.append(SaltPepper())
        if self.crop < 1:
            operations.append(CropResize(self.crop, most=1.0))
        if self.grey:
            operations.append(Grey())
        if self.jpeg is not None:
            operations.append(Jpeg(self.jpeg))
        return RandomCorruption(operations, self.corruption_probability)


_PAPER: dict[str, Any] = {
    "iterations": 10_000,
    "optimizer": "sgd",
    "lr": 2e-4,
    "corrupt_clean": False,
    "salt_pepper": False,
    "psnr_floor": None,
    "psnr_start": None,
    "max_change": None,
    "depth": 24,
    "decoder_depth": 8,
    "residual": False,
    "precision": "float32",
}
# The released loss is a sum over batch and tokens of a mean per patch, in [-1, 1]: at batch 16 and
# 64 tokens 16 * 64 * 4 / 3 of ours; its epsilon is half as large in [0, 1].
_RELEASED = {
    **_PAPER,
    "iterations": 100_000,
    "image_weight": 16 * 64 * 4 / 3,
    "mark_weight": 10.0,
    "clean_weight": 1.0,
    "epsilon": 0.5 / 255,
    "corruption_probability": 0.0,
}
_PRESETS: dict[str, dict[str, Any]] = {"robust": {}, "paper": _PAPER, "released": _RELEASED}
