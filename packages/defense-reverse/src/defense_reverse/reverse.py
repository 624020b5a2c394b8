"""Reverse engineering: for one label, the generator that reaches it with the smallest change.

Source: Zheng, Hua and Zhang, sections 3.3 and 3.4, equations 2 to 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_nc.inversion import frozen, predict_in_batches
from defense_reverse.generator import UNetGenerator
from defense_reverse.search import LambdaSearch, ReverseConfig
from defense_reverse.trigger import ReversedTrigger
from wm_inject import Lpips
from wm_inject.cli_common import progress as show_progress
from wm_inject.images import check_images, check_labels, quantize
from wm_victim.recipe import resolve_precision

Loss = Callable[[Tensor, Tensor], Tensor]  # generated, images (N, C, H, W) -> scalar


class _Found(NamedTuple):
    """A generator, and what it does to the defender's images."""

    success_rate: float
    residual: float
    state: dict[str, Tensor]


@torch.enable_grad()
def pretrain(
    images: Tensor, *, config: ReverseConfig | None = None, seed: int = 0, progress: bool = False
) -> UNetGenerator:
    """Train a generator to reconstruct images: the start that all labels share.

    Args:
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        config: Settings; the preset "robust" if None.
        seed: Seeds the weights and the order of the images.
        progress: Show how far it is.

    Raises:
        ValueError: Images that break the image contract.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.

    Source: section 4.1: "we first optimize the generator using L_rec for 20 epochs" (equation 3).
    """
    config = ReverseConfig() if config is None else config
    check_images(images)
    generator = UNetGenerator(
        channels=images.shape[1],
        width=config.width,
        depth=config.depth,
        convs=config.convs,
        residual=config.residual,
        seed=seed,
    )
    generator = generator.to(images.device).to(memory_format=torch.channels_last)
    reconstruction = _reconstruction(config, images.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = _batches(images, config.batch_size, torch.Generator().manual_seed(seed))
    # A residual generator starts as a perfect copy, where the gradient of equation 3 is zero.
    steps = 0 if config.residual else config.pretrain_steps
    for _ in show_progress(range(steps), desc="pre-train", enabled=progress):
        batch = next(batches)
        _step(optimizer, reconstruction(_generate(generator, batch, config), batch))
    return generator.to(memory_format=torch.contiguous_format).eval()


def reverse_engineer(
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    config: ReverseConfig | None = None,
    start: UNetGenerator | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ReversedTrigger:
    """Find the generator that sends images of other classes to ``target`` with the least change.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        target: The label to reach.
        config: Settings; the preset "robust" if None.
        start: The pre-trained generator to start from, not changed; pre-trained here if None.
        labels: int64 ``(N,)``: the true classes, or the model's own answers if None. Images of the
            target class are left out of training and of every measurement.
        seed: Seeds the order of the images (and the pre-training).
        progress: Show how far it is.

    Returns:
        Among the generators met that reach ``config.success_floor``, the start included, the one
        with the smallest residual; if none does, the one with the highest success rate.
        Both are measured on 8-bit images, on all images used.

    Raises:
        ValueError: Bad images or labels, a target that the model does not have, a start for other
            channels, or no image of another class.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.

    Source: equations 2 to 5. The paper does not say how lambda_1 is searched, nor whether class-y
        images are left out in training (equation 5 leaves them out of the score). Our residual is
        a mean over pixels where the paper's may be a sum: a constant factor.
    """
    config = ReverseConfig() if config is None else config
    check_images(images)
    with frozen(model):
        others = _other_classes(model, images, labels, target)
        if start is None:
            start = pretrain(images, config=config, seed=seed, progress=progress)
        elif start.config["channels"] != images.shape[1]:
            raise ValueError(
                f"expected a start of {images.shape[1]} channels, got {start.config['channels']}"
            )
        found = _search(
            model, others, target, config=config, start=start, seed=seed, progress=progress
        )
    # Contiguous weights, as in a file: the same bits before saving and after loading.
    generator = copy.deepcopy(start).to(memory_format=torch.contiguous_format)
    generator.load_state_dict(found.state)
    return ReversedTrigger(
        generator, target=target, success_rate=found.success_rate, residual_norm=found.residual
    )


def _other_classes(model: nn.Module, images: Tensor, labels: Tensor | None, target: int) -> Tensor:
    """The images that are not of class ``target``, after the refusals."""
    answers = predict_in_batches(model, images[:1] if labels is not None else images)
    if not 0 <= target < answers.shape[1]:
        raise ValueError(f"expected a target in 0 .. {answers.shape[1] - 1}, got {target}")
    if labels is None:
        labels = answers.argmax(1)
    check_labels(labels, len(images), num_classes=answers.shape[1])
    others = images[labels.to(images.device) != target]
    if len(others) == 0:
        raise ValueError(f"expected images of other classes than {target}, found none")
    return others


@torch.enable_grad()
def _search(
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    config: ReverseConfig,
    start: UNetGenerator,
    seed: int,
    progress: bool,
) -> _Found:
    """Train from ``start`` in rounds, each with the lambda_1 that the rounds before ask for."""
    generator = copy.deepcopy(start).to(memory_format=torch.channels_last)
    reconstruction = _reconstruction(config, images.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = _batches(images, config.batch_size, torch.Generator().manual_seed(seed))
    weight = LambdaSearch(config.lambdas[0], growth=config.growth, shrink=config.shrink)
    best = _measure(generator, model, images, target)
    bar = show_progress(range(1, config.steps + 1), desc=f"label {target}", enabled=progress)
    for step in bar:
        batch = next(batches)
        generated = _generate(generator, batch, config)
        goal = torch.full((len(batch),), target, device=batch.device)
        with _autocast(config, batch.device):
            logits = model(generated)
        attack = F.cross_entropy(logits.float(), goal)
        _step(optimizer, weight.value * attack + reconstruction(generated, batch))
        if step % config.round_steps == 0 or step == config.steps:
            now = _measure(generator, model, images, target)
            best = _better(best, now, config.success_floor)
            weight.update(success=now.success_rate >= config.success_floor)
            bar.set_postfix(success=best.success_rate, residual=best.residual, weight=weight.value)
    return best


def _better(old: _Found, new: _Found, floor: float) -> _Found:
    """The smaller residual among those above the floor; below it, the higher success rate."""
    if new.success_rate >= floor and old.success_rate >= floor:
        return new if new.residual < old.residual else old
    return new if new.success_rate > old.success_rate else old


def _measure(generator: UNetGenerator, model: nn.Module, images: Tensor, target: int) -> _Found:
    """Success rate and residual on 8-bit images, in float32."""
    hits, change = 0, 0.0
    with torch.no_grad():
        for part in images.split(256):
            generated = quantize(generator(part))
            hits += int((model(generated).argmax(1) == target).sum())
            change += float((generated - part).abs().mean(dim=(1, 2, 3)).double().sum())
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    return _Found(hits / len(images), change / len(images), state)


def _reconstruction(config: ReverseConfig, device: torch.device) -> Loss:
    """Equation 3: lambda_2 MSE + lambda_3 LPIPS."""
    _, mse, perceptual = config.lambdas
    if perceptual == 0:
        return lambda generated, images: mse * F.mse_loss(generated, images)
    lpips = Lpips().to(device)
    return lambda generated, images: (
        mse * F.mse_loss(generated, images) + perceptual * lpips(generated, images).mean()
    )


def _generate(generator: UNetGenerator, images: Tensor, config: ReverseConfig) -> Tensor:
    with _autocast(config, images.device):
        return generator(images)


def _autocast(config: ReverseConfig, device: torch.device) -> torch.autocast:
    low = resolve_precision(config.precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, every image once before any image again."""
    images = images.contiguous(memory_format=torch.channels_last)
    size = min(size, len(images))
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(len(images), generator=generator)])
        yield images[rest[:size].to(images.device)]
        rest = rest[size:]
