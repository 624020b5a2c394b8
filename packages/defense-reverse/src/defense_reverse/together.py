"""The engine that reverses the generators of all labels together: in groups, and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from defense_reverse.config import ReverseConfig
from defense_reverse.group import GroupTrainer, LabelRun
from defense_reverse.race import Race
from defense_reverse.reverse import settled
from defense_reverse.standing import Keeper, Reversed, Task
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress


def reverse_together(
    task: Task, *, progress: bool = False, checkpoint: Path | None = None
) -> Reversed:
    """Reverse the generators of all labels in the same steps.

    Each label sees the batches, the weights lambda_1 and the updates that it sees in
    `reverse_engineer`; only rounding tells the two apart. Labels are trained in groups that fit
    ``config.images_at_once``; what a label keeps between two groups is its weights, Adam's moments
    and its ``config.fallbacks`` best generators.

    Args:
        task: The scan.
        progress: Show how far it is.
        checkpoint: Write the state here after every group, go on from it if it is there, and
            remove it at the end.

    Raises:
        ValueError: A checkpoint of another scan, or a damaged one.
        LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.
    """
    config = task.config
    runs = [
        LabelRun(label, task.others(label), config=config, seed=task.seed)
        for label in range(task.num_classes)
    ]
    race = Race(candidates=config.candidates, references=config.references)
    keeper = Keeper(checkpoint, task)
    _restore(keeper.load(), runs, race, task.images.device)
    images = task.images.contiguous(memory_format=torch.channels_last)
    trainer = GroupTrainer(task.model, images, start=task.start, config=config)
    bar: Progress[None] = show_progress(
        total=len(runs) * config.steps, desc="steps", enabled=progress
    )
    with bar:
        bar.update(sum(run.steps for run in runs))
        for stop in config.stops():
            for group in _groups(runs, race, stop, config):
                trainer.train(group, stop, bar)
                keeper.save({"runs": [run.state() for run in runs], "race": race.state()})
            if config.race and stop < config.steps and not race.decided(stop):
                _drop(runs, race, stop, config, bar)
    triggers = {}
    for run in runs:
        assert run.record is not None
        where = run.others.to(images.device)
        trigger = settled(
            run.record, task.model, images[where], run.label, start=task.start, score=config.score
        )
        triggers[run.label] = trigger.cpu()
    keeper.remove()
    return Reversed(
        triggers,
        race.compare({label: trigger.residual_norm for label, trigger in triggers.items()}),
        {run.label: run.steps for run in runs},
        dict(race.left_at),
    )


def _restore(state: Any, runs: Sequence[LabelRun], race: Race, device: torch.device) -> None:
    if state is None:
        return
    for run, kept in zip(runs, state["runs"], strict=True):
        run.restore(kept, device)
    race.restore(state["race"])


def _groups(
    runs: Sequence[LabelRun], race: Race, stop: int, config: ReverseConfig
) -> Iterator[list[LabelRun]]:
    """The labels that still have steps to take before ``stop``, in groups that fit the budget."""
    size = max(1, config.images_at_once // config.batch_size)
    racing = [run for run in runs if run.label not in race.left_at and not run.finished]
    going = [run for run in racing if run.record is None or run.steps < stop]
    for begin in range(0, len(going), size):
        yield going[begin : begin + size]


def _drop(
    runs: Sequence[LabelRun], race: Race, stop: int, config: ReverseConfig, bar: Progress[Any]
) -> None:
    """Let the race decide at a milestone; who leaves needs no moments any more."""
    for label in race.leave({run.label: run.score for run in runs}, stop):
        runs[label].moments = None
        if not runs[label].finished:
            bar.update(config.steps - stop)
