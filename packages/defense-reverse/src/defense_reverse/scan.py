"""Scan a classifier with reversed generators: one per label, then one verdict."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from defense_nc import ScanReport
from defense_nc.verdict.report import judge_scan
from defense_reverse.config import ReverseConfig
from defense_reverse.in_turn import reverse_in_turn
from defense_reverse.reverse import pretrain
from defense_reverse.standing import Task, settings
from defense_reverse.together import reverse_together
from wm_inject.core.images import check_images, check_labels
from wm_victim.inference import frozen, predict

_ENGINES = {"together": reverse_together, "one-by-one": reverse_in_turn}


def scan(
    model: nn.Module,
    images: Tensor,
    *,
    config: ReverseConfig | None = None,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
) -> ScanReport:
    """Reverse a generator for every label, and decide whether one label is unusually easy to reach.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1] of at least two classes.
        config: Settings of the generators; the preset "fast", which is calibrated, if None.
        alpha: Share of clean models that may be called backdoored.
        max_ratio: A suspected label's score is at most this share of the median.
        labels: int64 ``(N,)``, the true classes; the model's own answers if None. Images of a label
            are left out when its generator is sought.
        seed: Seeds the shared start, and every label's order of images alike.
        progress: Show how far it is.
        device: Where to compute; where the model is, if None.
        checkpoint: A file for the state on the way: a scan that was killed goes on from it and ends
            with the same bytes. It is removed at the end.

    Returns:
        A report whose scores are the residuals of equation 5, as means per pixel in [0, 1], each at
        the same success floor and at equal effort (`Race.compare`); ``triggers`` holds a
        `ReversedTrigger` per label, on the CPU, with the residual as measured. ``config`` has the
        steps that each label took, and when it left the race.

    Raises:
        ValueError: Bad images, labels or settings, images of one class only, or a checkpoint that
            is damaged or belongs to another scan.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.

    Source: Zheng, Hua and Zhang, sections 3.3 and 3.4. The verdict rests on defense_nc's
        `judge_scan`; equation 6 is in the report beside it.
    """
    config = ReverseConfig.preset("fast") if config is None else config
    check_images(images)
    if not 0 < alpha < 1 or not 0 < max_ratio <= 1:
        raise ValueError(
            f"expected alpha in (0, 1) and max_ratio in (0, 1], got {alpha}, {max_ratio}"
        )
    with frozen(model):
        # A copy where it must move: the caller's model stays where it is.
        held = model if device is None else copy.deepcopy(model).to(device).eval()
        images = images.to(_place(held))
        answers = predict(held, images)
        labels = answers.argmax(1) if labels is None else labels.to(images.device)
        check_labels(labels, len(images), num_classes=answers.shape[1])
        if len(labels.unique()) < 2:
            raise ValueError("expected images of at least two classes, got one")
        start = pretrain(images, config=config, seed=seed, progress=progress)
        task = Task(held, images, labels, answers.shape[1], config, start, seed)
        found = _ENGINES[config.engine](
            task, progress=progress, checkpoint=None if checkpoint is None else Path(checkpoint)
        )
    report = judge_scan(
        "reverse-generator",
        torch.tensor([found.scores[label] for label in found.triggers]).double(),
        torch.tensor([trigger.success_rate for trigger in found.triggers.values()]).double(),
        model=model,
        images=images,
        settings=settings(config),
        floor=config.compared_from,
        alpha=alpha,
        max_ratio=max_ratio,
        triggers=found.triggers,
        seed=seed,
    )
    taken = {
        "label_steps": [found.steps[label] for label in found.triggers],
        "left_at": {str(label): step for label, step in found.left_at.items()},
    }
    return replace(report, config={**report.config, **taken})


def detection_case(flagged: Collection[int], target: int) -> int:
    """Which of the paper's four outcomes a scan of a backdoored model is.

    Args:
        flagged: The labels that the scan named.
        target: The label that the backdoor really asks for, >= 0.

    Returns:
        1: only the target is named. 2: the target and other labels are. 3: only other labels are.
        4: nothing is.

    Raises:
        ValueError: A negative label.

    Source: section 4.2.

    Examples:
        >>> [detection_case(flagged, 0) for flagged in ((0,), (0, 3), (3,), ())]
        [1, 2, 3, 4]
    """
    if target < 0 or any(label < 0 for label in flagged):
        raise ValueError(f"expected labels >= 0, got flagged {tuple(flagged)} and target {target}")
    if not flagged:
        return 4
    if target not in flagged:
        return 3
    return 1 if set(flagged) == {target} else 2


def _place(model: nn.Module) -> torch.device:
    tensor = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    return torch.device("cpu") if tensor is None else tensor.device
