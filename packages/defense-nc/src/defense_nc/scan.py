"""Scan a classifier with Neural Cleanse: one trigger per label, then one verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.batched import invert_triggers
from defense_nc.inversion import invert_trigger
from defense_nc.schedule import NCConfig
from defense_nc.search import check_inputs
from defense_nc.verdict.report import ScanReport, judge_scan
from wm_inject.core.images import check_images
from wm_inject.core.progress import progress as show_progress
from wm_victim.inference import frozen


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
    checkpoint: Path | None = None,
) -> ScanReport:
    """Reverse a trigger for every label, and decide whether one is unusually easy to reach.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1].
        config: Settings of the inversion; the preset "fast", which is calibrated, if None.
        alpha: Share of clean models that may be called backdoored.
        max_ratio: A suspected label's score is at most this share of the median.
        labels: int64 ``(N,)``, the true classes; the model's own answers if None. Images of a label
            are left out when its trigger is sought.
        seed: Seeds every label's start and order of images alike.
        progress: Show how far it is.
        device: Where to compute; where the model is, if None.
        checkpoint: Keep the state of the searches in this file, and go on from it if it is there;
            not with one label at a time.

    Returns:
        A report whose scores are the L1 norms of the masks, in pixels, at the effort of the labels
        that were searched longest; ``triggers`` holds an `InvertedTrigger` per label, on the CPU,
        and ``config["race_log"]`` says which label left the race when.

    Raises:
        ValueError: Bad images, labels or settings, or images of one class only.

    Source: Neural Cleanse, section IV. The verdict rests on `judge_scan`; the paper's own rule is
        in the report beside it.
    """
    config = NCConfig.preset("fast") if config is None else config
    check_images(images)
    if not 0 < alpha < 1 or not 0 < max_ratio <= 1:
        raise ValueError(
            f"expected alpha in (0, 1) and max_ratio in (0, 1], got {alpha}, {max_ratio}"
        )
    if checkpoint is not None and config.engine == "single":
        raise ValueError("expected no checkpoint with engine='single': it keeps none")
    with frozen(model), _moved(model, device) as place:
        images = images.to(place)
        labels, targets = check_inputs(model, images, labels, None)
        settings: dict[str, Any] = {"config": config, "labels": labels, "seed": seed}
        if config.engine == "single":
            triggers = {
                label: invert_trigger(model, images, label, **settings).cpu()
                for label in show_progress(targets, desc="labels", enabled=progress)
            }
            scores, race = [trigger.l1_norm for trigger in triggers.values()], None
        else:
            found = invert_triggers(
                model, images, progress=progress, checkpoint=checkpoint, **settings
            )
            triggers = {trigger.target: trigger.cpu() for trigger in found.triggers}
            scores, race = list(found.scores), found.race
    report = judge_scan(
        "neural-cleanse",
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor([one.success_rate for one in triggers.values()], dtype=torch.float64),
        model=model,
        images=images,
        settings=json.loads(json.dumps(asdict(config))),
        floor=config.floor,
        alpha=alpha,
        max_ratio=max_ratio,
        triggers=triggers,
        seed=seed,
    )
    return replace(report, config={**report.config, "race_log": race})


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
