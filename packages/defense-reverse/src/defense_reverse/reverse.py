"""Reverse engineering: for one label, the generator that reaches it with the smallest change.

Source: Zheng, Hua and Zhang, sections 3.3 and 3.4, equations 2 to 5.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_reverse.config import ReverseConfig
from defense_reverse.generator import UNetGenerator
from defense_reverse.rounds import (
    Batches,
    Found,
    LabelRecord,
    autocast,
    measure,
    reconstruction,
    round_subset,
)
from defense_reverse.stacked import filled, pack
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.images import check_images, check_labels
from wm_inject.core.progress import progress as show_progress
from wm_victim.inference import frozen, predict


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
    height, side = images.shape[2:]
    generator = UNetGenerator(
        channels=images.shape[1],
        width=config.width,
        depth=config.depth,
        convs=config.convs,
        residual=config.residual,
        picture_size=side if config.picture and height == side else None,
        seed=seed,
    )
    generator = generator.to(images.device).to(memory_format=torch.channels_last)
    loss = reconstruction(config, images.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = Batches(torch.arange(len(images)), config.batch_size, seed)
    images = images.contiguous(memory_format=torch.channels_last)
    # A residual generator starts as a perfect copy, where the gradient of equation 3 is zero.
    steps = 0 if config.residual else config.pretrain_steps
    for _ in show_progress(range(steps), desc="pre-train", enabled=progress):
        batch = images[batches.draw().to(images.device)]
        with autocast(config, images.device):
            generated = generator(batch)
        _step(optimizer, loss(generated, batch).mean())
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
        images = images.contiguous(memory_format=torch.channels_last)
        record, _ = search_label(
            model, images, others, target, config=config, start=start, seed=seed, progress=progress
        )
        where = others.to(images.device)
        return settled(record, model, images[where], target, start=start, score=config.score)


def settled(
    record: LabelRecord,
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    start: UNetGenerator,
    score: str,
) -> ReversedTrigger:
    """The trigger of the best generator found, measured in float32 on all images."""
    found = record.settle(
        lambda weights: measure(filled(start, weights), model, images, target, score=score)
    )
    return ReversedTrigger(
        filled(start, found.weights),
        target=target,
        success_rate=found.success_rate,
        residual_norm=found.residual,
    )


def _other_classes(model: nn.Module, images: Tensor, labels: Tensor | None, target: int) -> Tensor:
    """Where the images are that are not of class ``target``, after the refusals."""
    answers = predict(model, images[:1] if labels is not None else images)
    if not 0 <= target < answers.shape[1]:
        raise ValueError(f"expected a target in 0 .. {answers.shape[1] - 1}, got {target}")
    if labels is None:
        labels = answers.argmax(1)
    check_labels(labels, len(images), num_classes=answers.shape[1])
    others = (labels.cpu() != target).nonzero().flatten()
    if len(others) == 0:
        raise ValueError(f"expected images of other classes than {target}, found none")
    return others


@torch.enable_grad()
def search_label(
    model: nn.Module,
    images: Tensor,
    others: Tensor,
    target: int,
    *,
    config: ReverseConfig,
    start: UNetGenerator,
    seed: int = 0,
    progress: bool = False,
) -> tuple[LabelRecord, int]:
    """Train from ``start`` in rounds, each with the lambda_1 that the rounds before ask for.

    Args:
        model: Images in [0, 1] to logits, in eval mode and frozen.
        images: float32 ``(N, C, H, W)``, channels last.
        others: int64 ``(M,)``, where the images of other classes are.
        target: The label to reach.
        config: Settings.
        start: The generator to start from; not changed.
        seed: Seeds the order of the images.
        progress: Show how far it is.

    Returns:
        What was found, and how many steps it took.
    """
    step = 0
    generator = copy.deepcopy(start).to(memory_format=torch.channels_last)
    loss = reconstruction(config, images.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = Batches(others, config.batch_size, seed)
    judged = images[round_subset(others, config.round_images, seed).to(images.device)]

    def look() -> Found:
        with autocast(config, images.device):
            rates = measure(generator.transform, model, judged, target, score=config.score)
        return Found(*rates, pack(generator))

    record = LabelRecord(config, look())
    bar = show_progress(range(1, config.steps + 1), desc=f"label {target}", enabled=progress)
    for step in bar:
        batch = images[batches.draw().to(images.device)]
        with autocast(config, images.device):
            generated = generator.transform(batch)
            logits = model(generated)
        goal = torch.full((len(batch),), target, device=batch.device)
        attack = F.cross_entropy(logits.float(), goal)
        _step(optimizer, record.search.value * attack + loss(generated, batch).mean())
        if step % config.round_steps == 0 or step == config.steps:
            record.take(look())
            bar.set_postfix(residual=record.score, weight=record.search.value)
            if record.finished:
                break
    return record, step


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
