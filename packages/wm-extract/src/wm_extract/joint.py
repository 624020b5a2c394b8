"""Injector and extractor, trained together (equations 4, 5 and 6 of Spy-Watermark)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_extract.corruptions import (
    Corruption,
    GaussianNoise,
    RandomCorruption,
    RandomMask,
    Rescale,
    Rotation,
    SaltPepper,
)
from wm_extract.training_state import pack_training, unpack_training
from wm_extract.unet import UNetExtractor
from wm_inject import (
    ViTConfig,
    ViTInjector,
    check_images,
    default_watermark,
    load_checkpoint,
    quantize,
    save_checkpoint,
)
from wm_inject.cli_common import Progress
from wm_inject.cli_common import progress as show_progress
from wm_inject.vit import SIZES, check_watermark

CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class JointConfig:
    """How injector and extractor are trained. `preset` names the combinations that mean something.

    Args:
        recipe: The preset this came from; it goes into every record.
        size: Width of the injector: "tiny", "small", "base" or "large".
        iterations: Optimiser steps.
        batch_size: Images a step.
        optimizer: "sgd" with ``momentum`` at a constant rate (the paper), or "adamw" with a
            warm-up, a cosine to zero, and gradients clipped to norm 1.
        lr: Learning rate (the peak, for AdamW).
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
        psnr_floor: Least PSNR of every marked image, in dB, held by the injector itself; None
            leaves invisibility to equation 4 alone.
        psnr_start: Where the floor starts; it rises to ``psnr_floor`` over the first 40 % of the
            steps, so that the extractor first learns from a mark that is easy to see.
        max_change: Largest change of any value, in [0, 1] units, held by the injector too; None
            leaves it free. It keeps the mark from gathering in one visible place.
        depth: Encoder blocks.
        decoder_depth: Decoder blocks.
        residual: Add the decoder's output to x instead of reconstructing x.
        extractor_width: Base width of the U-Net.
        precision: "float32", or "bfloat16" autocast.

    Raises:
        ValueError: A value outside its range.

    Source: section 3.1 of the paper for lr, momentum, batch size, steps and weights.
    """

    recipe: str = "robust"
    size: str = "tiny"
    iterations: int = 1000
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
    psnr_floor: float | None = 38.5
    psnr_start: float | None = 26.0
    max_change: float | None = 6 / 255
    depth: int = 6
    decoder_depth: int = 2
    residual: bool = True
    extractor_width: int = 16
    precision: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"expected a size in {', '.join(SIZES)}, got {self.size!r}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"expected optimizer sgd or adamw, got {self.optimizer!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"expected precision float32 or bfloat16, got {self.precision!r}")
        for name in ("iterations", "batch_size", "warmup", "lr", "extractor_width", "depth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("image_weight", "mark_weight", "clean_weight", "epsilon"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        for name in ("psnr_floor", "psnr_start"):
            floor = getattr(self, name)
            if floor is not None and not floor > 0:
                raise ValueError(f"expected {name} > 0 dB, got {floor}")
        if self.max_change is not None and not 0 < self.max_change <= 1:
            raise ValueError(f"expected max_change in (0, 1], got {self.max_change}")
        if not 0 <= self.corruption_probability <= 1:
            raise ValueError(f"expected a probability in [0, 1], got {self.corruption_probability}")

    @classmethod
    def preset(cls, recipe: str = "robust", **changes: Any) -> JointConfig:
        """The settings of a recipe, with single fields changed.

        Args:
            recipe: "robust" (the default of this project), "paper" (the text to the letter), or
                "released" (the weights, domain and length of the authors' published code, whose
                augmentation of cover images is not reproduced).
            **changes: Fields to change.

        Raises:
            ValueError: An unknown recipe or field.
        """
        paper = cls(
            recipe="paper",
            iterations=10_000,
            optimizer="sgd",
            lr=2e-4,
            corrupt_clean=False,
            salt_pepper=False,
            psnr_floor=None,
            psnr_start=None,
            max_change=None,
            depth=24,
            decoder_depth=8,
            residual=False,
            precision="float32",
        )
        # The released loss is a sum over batch and tokens of a mean per patch, in [-1, 1]: at
        # batch 16 and 64 tokens 16 * 64 * 4 / 3 of ours; its epsilon is half as large in [0, 1].
        released = replace(
            paper,
            recipe="released",
            iterations=100_000,
            image_weight=16 * 64 * 4 / 3,
            mark_weight=10.0,
            clean_weight=1.0,
            epsilon=0.5 / 255,
            corruption_probability=0.0,
        )
        recipes = {"robust": cls(), "paper": paper, "released": released}
        if recipe not in recipes:
            raise ValueError(f"expected a recipe in {', '.join(recipes)}, got {recipe!r}")
        try:
            return replace(recipes[recipe], **changes)
        except TypeError as error:
            raise ValueError(f"expected settings of JointConfig: {error}") from error

    def injector(self, *, image_size: int, channels: int) -> ViTConfig:
        """The injector this configuration trains on images of this shape."""
        shape = ViTConfig.preset(self.size, image_size=image_size, channels=channels)
        return replace(
            shape,
            depth=self.depth,
            decoder_depth=self.decoder_depth,
            residual=self.residual,
            psnr_floor=self.psnr_floor,
            max_change=self.max_change,
        )

    def anti_collapse(self) -> RandomCorruption:
        """The operations of equation 6 with their probability."""
        operations: list[Corruption] = [
            RandomMask("pixel"),
            RandomMask("block"),
            Rotation(),
            GaussianNoise(),
            Rescale(),
        ]
        if self.salt_pepper:
            operations.append(SaltPepper())
        return RandomCorruption(operations, self.corruption_probability)


class JointLosses(NamedTuple):
    """The losses of one step, unweighted."""

    step: int
    image: float  # equation 4
    mark: float  # equation 5, the half on marked images
    clean: float  # equation 5, the half on clean images


class JointResult(NamedTuple):
    """A trained pair, both in eval mode, and how it went (one entry every 50 steps)."""

    injector: ViTInjector
    extractor: UNetExtractor
    watermark: Tensor  # (1, H, W)
    history: tuple[JointLosses, ...]


def image_loss(marked: Tensor, images: Tensor, *, epsilon: float = 1 / 255) -> Tensor:
    """Equation 4: the squared excess of the change over epsilon.

    It is summed over channels and averaged over pixels and images.

    Args:
        marked: ``(N, C, H, W)``.
        images: The originals, the same shape.
        epsilon: A change up to this is free.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes differ, or there is no image.
    """
    if marked.ndim != 4 or marked.shape != images.shape or len(marked) == 0:
        shapes = f"{tuple(marked.shape)} and {tuple(images.shape)}"
        raise ValueError(f"expected two batches of one shape, got {shapes}")
    return F.relu((marked - images).abs() - epsilon).square().sum(1).mean()


def map_loss(maps: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """One half of equation 5: the squared distance of every scale's map to the wanted picture.

    Args:
        maps: Logit maps ``(N, 1, H, W)``, one a scale.
        wanted: ``(1, H, W)`` in [0, 1].

    Returns:
        A scalar: the mean over pixels and images, summed over scales.

    Raises:
        ValueError: No maps, or a picture of another size.
    """
    if not maps or any(m.ndim != 4 or m.shape[1:] != wanted.shape for m in maps):
        raise ValueError(f"expected maps (N, 1, H, W) that fit a picture {tuple(wanted.shape)}")
    losses = [(m.float().sigmoid() - wanted).square().mean() for m in maps]
    return torch.stack(losses).sum()


def train_jointly(
    images: Tensor,
    *,
    config: JointConfig,
    watermark: Tensor | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> JointResult:
    """Train an injector and an extractor on clean images; no labels, no victim.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1], square, on the device to train on.
        config: The recipe.
        watermark: float32 ``(1, H, W)`` in [0, 1]; the default picture if None.
        seed: Seeds weights, batches and corruptions; the same seed on CPU gives the same bytes.
        checkpoint: Where to keep the state every 250 steps; a run that finds it goes on from it.
        progress: Show how far it is.

    Raises:
        ValueError: Images or watermark break their contract, or the checkpoint is of another run.
        RuntimeError: The loss is no longer finite.
    """
    check_images(images)
    _, channels, side, width = images.shape
    if side != width:
        raise ValueError(f"expected square images, got {side} x {width}")
    mark = default_watermark(side) if watermark is None else watermark
    mark = check_watermark(mark, size=side).to(images.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # module initialisers take no generator
        injector = ViTInjector.from_config(config.injector(image_size=side, channels=channels))
        extractor = UNetExtractor(channels=channels, width=config.extractor_width)
    modules: dict[str, nn.Module] = {"injector": injector, "extractor": extractor}
    for module in modules.values():
        module.to(images.device).train()
    optimizer = _optimizer(config, [p for m in modules.values() for p in m.parameters()])
    generator = torch.Generator().manual_seed(seed)
    run = _run_identity(config, images, mark, seed)
    history: list[JointLosses] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, kind="joint-training")
        if saved.config != run:
            raise ValueError(f"{checkpoint} belongs to another run: remove it or choose another")
        unpack_training(saved.state, modules, optimizer, generator)
        history = [JointLosses(*row) for row in saved.metadata["history"]]
        start = int(saved.metadata["step"])
    bar: Progress[None]
    with show_progress(total=config.iterations, desc="train mark", enabled=progress) as bar:
        bar.update(start)
        for step in range(start, config.iterations):
            _schedule(config, optimizer, injector, step)
            losses = _step(config, injector, extractor, optimizer, images, mark, generator, step)
            last = step + 1 == config.iterations
            save = checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0
            if (step + 1) % 50 == 0 or last:
                history.append(JointLosses(step + 1, *(float(v) for v in losses)))
                if not all(math.isfinite(v) for v in history[-1]):
                    raise RuntimeError(f"the loss is not finite at step {step + 1}: lower the lr")
                bar.set_postfix(mark=history[-1].mark, clean=history[-1].clean)
            if save and checkpoint is not None:
                save_checkpoint(
                    checkpoint,
                    kind="joint-training",
                    config=run,
                    state=pack_training(modules, optimizer, generator),
                    metadata={"step": step + 1, "history": history},
                )
            bar.update()
    return JointResult(injector.eval(), extractor.eval(), mark, tuple(history))


def _optimizer(config: JointConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)


def _schedule(
    config: JointConfig, optimizer: torch.optim.Optimizer, injector: ViTInjector, step: int
) -> None:
    """Set the learning rate and the PSNR floor of a step."""
    if config.optimizer == "adamw":
        warm = min(1.0, (step + 1) / config.warmup)
        lr = config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
        for group in optimizer.param_groups:
            group["lr"] = lr
    if config.psnr_floor is not None and config.psnr_start is not None:
        way = min(1.0, step / (0.4 * config.iterations))
        # The last step always runs at the full floor, however few steps there are.
        way = 1.0 if step + 1 == config.iterations else way
        floor = config.psnr_start + way * (config.psnr_floor - config.psnr_start)
        slack = 10 ** ((config.psnr_floor - floor) / 20)  # both bounds close in together
        change = None if config.max_change is None else min(1.0, slack * config.max_change)
        injector.shape = replace(injector.shape, psnr_floor=floor, max_change=change)


def _step(
    config: JointConfig,
    injector: ViTInjector,
    extractor: UNetExtractor,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    mark: Tensor,
    generator: torch.Generator,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    corrupt = config.anti_collapse()
    rows = torch.randint(len(images), (config.batch_size,), generator=generator)
    x = images[rows.to(images.device)]
    low = config.precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        marked = injector(x, mark).float()
        seen = marked.clamp(0, 1)
        seen = seen + (quantize(seen) - seen).detach()  # files keep 8 bits: straight through
        seen = corrupt(seen.clamp(0, 1), generator=generator)
        clean = corrupt(x, generator=generator) if config.corrupt_clean else x
        # One batch, so that batch norm cannot tell marked from clean by its statistics.
        maps = extractor.scales(torch.cat([seen, clean]))
    image = image_loss(marked, x, epsilon=config.epsilon)
    found = map_loss([m[: len(x)] for m in maps], mark)
    nothing = map_loss([m[len(x) :] for m in maps], torch.zeros_like(mark))
    loss = config.image_weight * image + config.mark_weight * found + config.clean_weight * nothing
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.optimizer == "adamw":
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return image.detach(), found.detach(), nothing.detach()


def _run_identity(config: JointConfig, images: Tensor, mark: Tensor, seed: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in (images, mark):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    settings = json.loads(json.dumps(asdict(config)))
    return {"settings": settings, "seed": seed, "data": digest.hexdigest()}
