"""Reverse engineering: for one label, the generator that reaches it with the smallest change.

Source: Zheng, Hua and Zhang, sections 3.3 and 3.4, equations 2 to 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defense_nc.scan_inputs import ScanInputs
from defense_reverse.config import ReverseConfig
from defense_reverse.engines.sequential import search_label
from defense_reverse.engines.task import ScanTask
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import autocast, descend, label_batches, reconstruction
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.images import check_images, check_labels
from wm_inject.core.progress import progress as show_progress
from wm_victim.inference import frozen, predict


@torch.enable_grad()
def pretrain(
    images: Tensor, *, config: ReverseConfig | None = None, seed: int = 0, progress: bool = False
) -> UNetGenerator:
    """Train a generator to reconstruct images: the start that all labels share.

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
    batches = label_batches(torch.arange(len(images)), config, seed)
    images = images.contiguous(memory_format=torch.channels_last)
    # A residual generator starts as a perfect copy, where the gradient of equation 3 is zero.
    steps = 0 if config.residual else config.pretrain_steps
    for _ in show_progress(range(steps), desc="pre-train", enabled=progress):
        batch = images[next(batches).to(images.device)]
        with autocast(config, images.device):
            generated = generator(batch)
        descend(optimizer, loss(generated, batch).mean())
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
        target: The label to reach; images of this class are left out of all measurements.
        start: The pre-trained generator to start from, not changed; pre-trained here if None.

    Returns:
        Among the generators met that reach ``config.success_floor``, the start included, the one
        with the smallest residual; if none does, the one with the highest success rate.
        Both are measured on 8-bit images, on all images used.

    Raises:
        ValueError: A target that the model does not have, or no image of another class.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.

    Source: equations 2 to 5. The paper does not say how lambda_1 is searched, nor whether class-y
        images are left out in training (equation 5 leaves them out of the score). Our residual is
        a mean over pixels where the paper's may be a sum: a constant factor.
    """
    config = ReverseConfig() if config is None else config
    check_images(images)
    with frozen(model):
        logits = predict(model, images[:1] if labels is not None else images)
        num_classes = logits.shape[1]
        if not 0 <= target < num_classes:
            raise ValueError(f"expected a target in 0 .. {num_classes - 1}, got {target}")
        labels = logits.argmax(1) if labels is None else labels
        check_labels(labels, len(images), num_classes=num_classes)
        if bool((labels == target).all()):
            raise ValueError(f"expected images of other classes than {target}, got none")
        if start is None:
            start = pretrain(images, config=config, seed=seed, progress=progress)
        elif start.config["channels"] != images.shape[1]:
            raise ValueError(
                f"expected a start of {images.shape[1]} channels, got {start.config['channels']}"
            )
        task = ScanTask(ScanInputs(model, images, labels, num_classes), config, start, seed)
        state, _ = search_label(task, target, progress=progress)
        return task.trigger(target, state)
