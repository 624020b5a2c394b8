"""One label after the other: the reference of the batched engine."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from defense_reverse.engines.stack import pack, with_weights
from defense_reverse.engines.task import ScanTask, SearchResult
from defense_reverse.label_state import (
    Candidate,
    LabelState,
    autocast,
    count_gradients,
    descend,
    label_batches,
    measure,
    reconstruction,
    round_subset,
)
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.progress import progress as show_progress


def search_in_turn(
    task: ScanTask, *, progress: bool = False, checkpoint: Path | None = None
) -> SearchResult:
    """Search the labels of a scan in turn, each to its end; saves after each label."""
    file = task.resume_file(checkpoint)
    rows: list[tuple[float, float, torch.Tensor, int, float]] = file.load() or []
    for label in show_progress(range(task.inputs.num_classes), desc="labels", enabled=progress):
        if label < len(rows):
            continue
        state, steps = search_label(task, label)
        trigger = task.trigger(label, state).cpu()
        weights = pack(trigger.generator)
        starved = state.gradients.share
        rows.append((trigger.success_rate, trigger.residual_norm, weights, steps, starved))
        file.save(rows)
    triggers = {
        label: ReversedTrigger(
            with_weights(task.start, weights).cpu(),
            target=label,
            success_rate=rate,
            residual_norm=residual,
        )
        for label, (rate, residual, weights, *_) in enumerate(rows)
    }
    file.remove()
    scores = {label: trigger.residual_norm for label, trigger in triggers.items()}
    steps_by_label = {label: row[3] for label, row in enumerate(rows)}
    shares = {label: row[4] for label, row in enumerate(rows)}
    return SearchResult(triggers, scores, steps_by_label, {}, shares)


@torch.enable_grad()
def search_label(task: ScanTask, target: int, *, progress: bool = False) -> tuple[LabelState, int]:
    """Train one label's generator; returns the state at the end and how many steps were taken."""
    config, model, others = task.config, task.inputs.model, task.others(target)
    images = task.images
    generator = copy.deepcopy(task.start).to(memory_format=torch.channels_last)
    loss = reconstruction(config, images.device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr)
    batches = label_batches(others, config, task.seed)
    judged = images[round_subset(others, config.round_images, task.seed).to(images.device)]

    def candidate() -> Candidate:
        with autocast(config, images.device):
            rates = measure(generator.transform, model, judged, target, score=config.score)
        return Candidate(*rates, pack(generator))

    def count() -> None:
        with autocast(config, images.device):
            state.gradients.add(*count_gradients(generator.transform, model, judged, target))

    step, state = 0, LabelState(config, candidate())
    count()
    bar = show_progress(range(1, config.steps + 1), desc=f"label {target}", enabled=progress)
    for step in bar:
        batch = images[others[next(batches)].to(images.device)]  # (B, C, H, W)
        with autocast(config, images.device):
            generated = generator.transform(batch)
            logits = model(generated)  # (B, K)
        goal = torch.full((len(batch),), target, device=batch.device)
        attack = F.cross_entropy(logits.float(), goal)
        descend(optimizer, state.search.value * attack + loss(generated, batch).mean())
        if step % config.round_steps == 0 or step == config.steps:
            state.update(candidate())
            count()
            bar.set_postfix(residual=state.score, weight=state.search.value)
            if state.finished:
                break
    return state, step
