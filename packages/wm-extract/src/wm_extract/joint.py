"""Injector and extractor, trained together (equations 4, 5 and 6 of Spy-Watermark)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_extract.joint_config import JointConfig
from wm_extract.unet import UNetExtractor
from wm_inject import ViTInjector, check_images, default_watermark, quantize
from wm_inject.core.precision import resolve_precision
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.randomness import seeded
from wm_inject.core.resume import fingerprint, load_state, save_state
from wm_inject.watermark.picture import check_watermark
from wm_inject.watermark.vit import Bounds

CHECKPOINT_EVERY = 250
_KIND = "joint-training"


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

    It is summed over channels and averaged over pixels and images; the shapes must agree.
    """
    if marked.ndim != 4 or marked.shape != images.shape or len(marked) == 0:
        shapes = f"{tuple(marked.shape)} and {tuple(images.shape)}"
        raise ValueError(f"expected two batches of one shape, got {shapes}")
    return F.relu((marked - images).abs() - epsilon).square().sum(1).mean()


def map_loss(maps: Sequence[Tensor], picture: Tensor) -> Tensor:
    """One half of equation 5: the squared distance of every scale's map to a picture.

    The mean over pixels and images, summed over scales.

    Args:
        maps: Logit maps ``(N, 1, H, W)``, one a scale.
        picture: ``(1, H, W)`` in [0, 1].
    """
    if not maps or any(m.ndim != 4 or m.shape[1:] != picture.shape for m in maps):
        raise ValueError(f"expected maps (N, 1, H, W) that fit a picture {tuple(picture.shape)}")
    losses = [(m.float().sigmoid() - picture).square().mean() for m in maps]
    return torch.stack(losses).sum()


def train_jointly(
    images: Tensor,
    *,
    config: JointConfig,
    watermark: Tensor | None = None,
    encoder: Mapping[str, Tensor] | None = None,
    start: tuple[ViTInjector, UNetExtractor] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> JointResult:
    """Train an injector and an extractor on clean images; no labels, no victim.

    Args:
        images: Square images on the device to train on.
        config: The recipe.
        watermark: float32 ``(1, H, W)`` in [0, 1]; the default picture if None.
        encoder: State dict of timm's MAE ViT to start the injector's encoder from, such as
            ``vit_large_patch16_224.mae`` for size "large"; fresh weights if None.
        start: A trained pair to go on from, which is left as it is; fresh weights if None.

    Raises:
        ValueError: Images or watermark break their contract, the weights to start from are of
            another architecture, or the checkpoint is of another run.
        RuntimeError: The loss is no longer finite.
    """
    check_images(images)
    _, channels, side, width = images.shape
    if side != width:
        raise ValueError(f"expected square images, got {side} x {width}")
    mark = default_watermark(side) if watermark is None else watermark
    mark = check_watermark(mark, size=side).to(images.device)
    with seeded(seed):
        injector = config.injector(image_size=side, channels=channels)
        extractor = UNetExtractor(channels=channels, width=config.extractor_width)
    if start is not None:
        for fresh, trained in zip((injector, extractor), start, strict=True):
            _go_on_from(fresh, trained)
    if encoder is not None:
        injector.load_mae_encoder(encoder)
    modules = nn.ModuleDict({"injector": injector, "extractor": extractor})
    modules.to(images.device).train()
    optimizer = _optimizer(config, list(modules.parameters()))
    generator = torch.Generator().manual_seed(seed)
    run = {
        "settings": asdict(config),
        "seed": seed,
        "data": fingerprint(images, mark, *(encoder or {}).values(), *_tensors(start)),
    }
    history: list[JointLosses] = []
    first = 0
    saved = None if checkpoint is None else load_state(checkpoint, kind=_KIND, run=run)
    if saved is not None:
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        history = [JointLosses(*row) for row in saved["history"]]
        first = saved["step"]
    bar: Progress[None]
    with show_progress(total=config.iterations, desc="train mark", enabled=progress) as bar:
        bar.update(first)
        for step in range(first, config.iterations):
            losses = _step(config, injector, extractor, optimizer, images, mark, generator, step)
            last = step + 1 == config.iterations
            if (step + 1) % 50 == 0 or last:
                history.append(JointLosses(step + 1, *(float(v) for v in losses)))
                if not all(math.isfinite(v) for v in history[-1]):
                    raise RuntimeError(f"the loss is not finite at step {step + 1}: lower the lr")
                bar.set_postfix(mark=history[-1].mark, clean=history[-1].clean)
            if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0:
                state = {
                    "modules": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "history": history,
                    "step": step + 1,
                }
                save_state(checkpoint, state, kind=_KIND, run=run)
            bar.update()
    return JointResult(injector.eval(), extractor.eval(), mark, tuple(history))


def _go_on_from(fresh: nn.Module, trained: nn.Module) -> None:
    """Load a trained network's weights into a fresh one.

    Raises:
        ValueError: It is of another architecture.
    """
    state = trained.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
        kind = type(fresh).__name__
        raise ValueError(
            f"expected a {kind} of the size, channels and image size that are to be trained, "
            "got another one to start from"
        )
    fresh.load_state_dict(state)


def _tensors(start: tuple[nn.Module, nn.Module] | None) -> list[Tensor]:
    return [tensor for one in start or () for tensor in one.state_dict().values()]


def _optimizer(config: JointConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.peak_lr, momentum=config.momentum)
    return torch.optim.AdamW(parameters, lr=config.peak_lr, weight_decay=0.01)


def _learning_rate(config: JointConfig, step: int) -> float:
    if config.optimizer == "sgd":
        return config.peak_lr
    warm = min(1.0, (step + 1) / config.warmup)
    return config.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def _bounds(config: JointConfig, step: int) -> Bounds:
    """What the injector's residual is held within: both bounds close in together."""
    if config.psnr_floor is None or config.psnr_start is None:
        return Bounds(config.psnr_floor, config.max_change)
    progress = min(1.0, step / (0.4 * config.iterations))
    # The last step always runs at the full floor, however few steps there are.
    progress = 1.0 if step + 1 == config.iterations else progress
    floor = config.psnr_start + progress * (config.psnr_floor - config.psnr_start)
    slack = 10 ** ((config.psnr_floor - floor) / 20)
    change = None if config.max_change is None else min(1.0, slack * config.max_change)
    return Bounds(floor, change)


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
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, step)
    corrupt = config.anti_collapse()
    rows = torch.randint(len(images), (config.batch_size,), generator=generator)
    x = images[rows.to(images.device)]
    # Where bfloat16 is emulated, a step takes ten times as long as in float32, or more.
    low = config.precision == "bfloat16" and resolve_precision("auto", images.device)
    ramp = _ramp(config, step)
    diversity, forgery = ramp * config.diversity_weight, ramp * config.forgery_weight
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low == torch.bfloat16):
        marked = injector(x, mark, bounds=_bounds(config, step)).float()
        inputs = [corrupt(_stored(_less_others(config, marked, x, generator)), generator=generator)]
        inputs.append(corrupt(x, generator=generator) if config.corrupt_clean else x)
        if forgery > 0:
            forged = _stored(x + (marked - x).mean(0))
            inputs.append(corrupt(forged, generator=generator))
        # One batch, so that batch norm cannot tell marked from clean by its statistics.
        maps = extractor.scales(torch.cat(inputs))
    parts = [[m[start : start + len(x)] for m in maps] for start in range(0, len(maps[0]), len(x))]
    image_term = image_loss(marked, x, epsilon=config.epsilon)
    mark_term = map_loss(parts[0], mark)
    clean_term = map_loss(parts[1], torch.zeros_like(mark))
    loss = (
        config.image_weight * image_term
        + config.mark_weight * mark_term
        + config.clean_weight * clean_term
    )
    if diversity > 0:
        loss = loss + diversity * _alike(marked - x)
    if forgery > 0:
        loss = loss + forgery * map_loss(parts[2], torch.zeros_like(mark))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.optimizer == "adamw":
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return image_term.detach(), mark_term.detach(), clean_term.detach()


def _stored(images: Tensor) -> Tensor:
    """Images in 8 bits, with gradients straight through the rounding."""
    inside = images.clamp(0, 1)
    return (inside + (quantize(inside) - inside).detach()).clamp(0, 1)


def _ramp(config: JointConfig, step: int) -> float:
    """How much of the weights that grow is reached at a step, in [0, 1]."""
    begin, end = (share * config.iterations for share in config.ramp)
    return min(1.0, max(0.0, (step + 1 - begin) / max(end - begin, 1)))


def _alike(change: Tensor) -> Tensor:
    """The mean squared cosine between the changes of two images of a batch."""
    units = F.normalize(change.flatten(1), dim=1)
    squares = (units @ units.T).square()
    count = len(change)
    return (squares.sum() - squares.diagonal().sum()) / max(count * (count - 1), 1)


def _others(change: Tensor, generator: torch.Generator) -> Tensor:
    """For every image another one's change or, for half of them, the mean of all."""
    shift = int(torch.randint(1, len(change), (), generator=generator)) if len(change) > 1 else 0
    single = torch.rand(len(change), 1, 1, 1, generator=generator).to(change) < 0.5
    return torch.where(single, change.roll(shift, 0), change.mean(0, keepdim=True))


def _less_others(
    config: JointConfig, marked: Tensor, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Marked images, a share of them without a part in [0, 1] of another image's change."""
    if config.subtraction == 0:
        return marked
    draws = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images)
    part = draws[0] * (draws[1] < config.subtraction)
    # What an attacker takes off is a fixed picture to whoever trains the injector.
    return marked - part * _others((marked - images).detach(), generator)
