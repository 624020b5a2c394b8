"""Injector and extractor, trained together (equations 4, 5 and 6 of Spy-Watermark)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_extract.recipe import JointConfig
from wm_extract.training_state import pack_training, unpack_training
from wm_extract.unet import UNetExtractor
from wm_inject import (
    ViTInjector,
    check_images,
    default_watermark,
    load_checkpoint,
    quantize,
    save_checkpoint,
)
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.watermark.vit import check_watermark

CHECKPOINT_EVERY = 250


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
    encoder: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> JointResult:
    """Train an injector and an extractor on clean images; no labels, no victim.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1], square, on the device to train on.
        config: The recipe.
        watermark: float32 ``(1, H, W)`` in [0, 1]; the default picture if None.
        encoder: State dict of timm's MAE ViT to start the injector's encoder from, such as
            ``vit_large_patch16_224.mae`` for size "large"; fresh weights if None.
        seed: Seeds weights, batches and corruptions; the same seed on CPU gives the same bytes.
        checkpoint: Where to keep the state every 250 steps; a run that finds it goes on from it.
        progress: Show how far it is.

    Raises:
        ValueError: Images or watermark break their contract, the encoder's weights are of another
            architecture, or the checkpoint is of another run.
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
    if encoder is not None:
        injector.load_mae_encoder(encoder)
    modules: dict[str, nn.Module] = {"injector": injector, "extractor": extractor}
    for module in modules.values():
        module.to(images.device).train()
    optimizer = _optimizer(config, [p for m in modules.values() for p in m.parameters()])
    generator = torch.Generator().manual_seed(seed)
    run = _run_identity(config, [images, mark, *(encoder or {}).values()], seed)
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
        return torch.optim.SGD(parameters, lr=config.peak_lr, momentum=config.momentum)
    return torch.optim.AdamW(parameters, lr=config.peak_lr, weight_decay=0.01)


def _schedule(
    config: JointConfig, optimizer: torch.optim.Optimizer, injector: ViTInjector, step: int
) -> None:
    """Set the learning rate and the PSNR floor of a step."""
    if config.optimizer == "adamw":
        warm = min(1.0, (step + 1) / config.warmup)
        lr = config.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
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


def _run_identity(config: JointConfig, inputs: Sequence[Tensor], seed: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in inputs:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    settings = json.loads(json.dumps(asdict(config)))
    return {"settings": settings, "seed": seed, "data": digest.hexdigest()}
