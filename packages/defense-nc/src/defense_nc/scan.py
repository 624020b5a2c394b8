"""Scan a classifier with Neural Cleanse: one trigger per label, then one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from defense_nc.inversion import frozen, invert_trigger, predict_in_batches
from defense_nc.report import ScanReport, judge
from defense_nc.schedule import NCConfig
from defense_nc.trigger import InvertedTrigger
from wm_inject.cli_common import progress as show_progress
from wm_inject.images import check_images, check_labels


def scan(
    model: nn.Module,
    images: Tensor,
    *,
    config: NCConfig | None = None,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> ScanReport:
    """Reverse a trigger for every label, and decide whether one is unusually easy to reach.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        config: Settings of the inversion; the preset "robust" if None.
        alpha: Share of clean models that may be called backdoored.
        max_ratio: A suspected label's score is at most this share of the median.
        labels: int64 ``(N,)``, the true classes; the model's own answers if None. Images of a label
            are left out when its trigger is sought.
        seed: Seeds every label's start and order of images alike.
        progress: Show how far it is.
        device: Where to compute; where the model is, if None.

    Returns:
        A report whose scores are the L1 norms of the masks, in pixels; ``triggers`` holds an
        `InvertedTrigger` per label, on the CPU.

    Raises:
        ValueError: Bad images, labels or settings, or images of one class only.

    Source: Neural Cleanse, section IV. The verdict rests on `outlier_test`; the paper's own rule is
        in the report beside it.
    """
    config = NCConfig() if config is None else config
    check_images(images)
    if not 0 < alpha < 1 or not 0 < max_ratio <= 1:
        raise ValueError(
            f"expected alpha in (0, 1) and max_ratio in (0, 1], got {alpha}, {max_ratio}"
        )
    triggers: dict[int, InvertedTrigger] = {}
    with frozen(model), _moved(model, device) as place:
        images = images.to(place)
        answers = predict_in_batches(model, images)
        num_classes = answers.shape[1]
        labels = answers.argmax(1) if labels is None else labels.to(place)
        check_labels(labels, len(images), num_classes=num_classes)
        for label in show_progress(range(num_classes), desc="labels", enabled=progress):
            trigger = invert_trigger(model, images, label, config=config, labels=labels, seed=seed)
            triggers[label] = trigger.cpu()
    scores = [trigger.l1_norm for trigger in triggers.values()]
    success_rates = [trigger.success_rate for trigger in triggers.values()]
    return judge(
        "neural-cleanse",
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(success_rates, dtype=torch.float64),
        floor=config.floor,
        alpha=alpha,
        max_ratio=max_ratio,
        triggers=triggers,
        config={**asdict(config), "betas": list(config.betas), "images": len(images)},
        seed=seed,
    )


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Hold a model on another device for a while, then bring it back."""
    tensor = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    home = tensor.device if tensor is not None else torch.device("cpu")
    place = home if device is None else torch.device(device)
    try:
        model.to(place)
        yield place
    finally:
        model.to(home)
