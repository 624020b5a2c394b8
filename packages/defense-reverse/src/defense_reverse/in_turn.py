"""The engine that reverses one label after the other: the reference of `reverse_together`."""

from __future__ import annotations

from pathlib import Path

import torch

from defense_reverse.reverse import search_label, settled
from defense_reverse.rounds import Found
from defense_reverse.stacked import filled, pack
from defense_reverse.standing import Keeper, Reversed, Task
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.progress import progress as show_progress


def reverse_in_turn(
    task: Task, *, progress: bool = False, checkpoint: Path | None = None
) -> Reversed:
    """Reverse one label after the other, as `reverse_engineer` does; without a race.

    Args:
        task: The scan.
        progress: Show how far it is.
        checkpoint: Write the labels done here after each, go on from it if it is there, and remove
            it at the end.

    Raises:
        ValueError: A checkpoint of another scan, or a damaged one.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.
    """
    keeper = Keeper(checkpoint, task)
    done: list[tuple[float, float, torch.Tensor, int]] = keeper.load() or []
    images = task.images.contiguous(memory_format=torch.channels_last)
    for label in show_progress(range(task.num_classes), desc="labels", enabled=progress):
        if label < len(done):
            continue
        others = task.others(label)
        record, steps = search_label(
            task.model,
            images,
            others,
            label,
            config=task.config,
            start=task.start,
            seed=task.seed,
        )
        where = others.to(images.device)
        trigger = settled(
            record, task.model, images[where], label, start=task.start, score=task.config.score
        ).cpu()
        found = Found(trigger.success_rate, trigger.residual_norm, pack(trigger.generator))
        done.append((*found, steps))
        keeper.save(done)
    triggers = {
        label: ReversedTrigger(
            filled(task.start, weights).cpu(), target=label, success_rate=rate, residual_norm=change
        )
        for label, (rate, change, weights, _) in enumerate(done)
    }
    keeper.remove()
    scores = {label: trigger.residual_norm for label, trigger in triggers.items()}
    return Reversed(triggers, scores, {label: row[3] for label, row in enumerate(done)}, {})
