"""All labels in the same steps: in groups that fit the memory budget, and resumable."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from defense_nc.label_halving import LabelHalving
from defense_reverse.config import ReverseConfig
from defense_reverse.engines.stack import GeneratorStack, Moments, initial_moments
from defense_reverse.engines.stopping_rules import generator_halving
from defense_reverse.engines.task import ScanTask, SearchResult
from defense_reverse.label_state import (
    Candidate,
    LabelState,
    autocast,
    count_gradients,
    label_batches,
    measure,
    reconstruction,
    round_subset,
)
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_victim.forward_fusion import channels_last


def search_together(
    task: ScanTask, *, progress: bool = False, checkpoint: Path | None = None
) -> SearchResult:
    """Search the generators of all labels in the same steps; saves after every group.

    Each label sees the batches, the weights lambda_1 and the updates that it sees in
    `search_label`; only rounding tells the two apart. Labels are trained in groups that fit
    ``config.images_at_once``; between two groups a label keeps its weights, Adam's moments and its
    best generators.
    """
    config = task.config
    searches = [
        LabelSearch(label, task.others(label), config=config, seed=task.seed)
        for label in range(task.inputs.num_classes)
    ]
    halving = generator_halving(config)
    file = task.resume_file(checkpoint)
    if (saved := file.load()) is not None:
        for search, state in zip(searches, saved["searches"], strict=True):
            search.load_state_dict(state, task.inputs.images.device)
        halving.load_state_dict(saved["halving"])
    trainer = GroupTrainer(task)
    bar: Progress[None] = show_progress(
        total=len(searches) * config.steps, desc="steps", enabled=progress
    )
    with bar:
        bar.update(sum(search.steps for search in searches))
        for stop in config.stops():
            for group in _groups(searches, halving, stop, config):
                trainer.train(group, stop, bar)
                states = [search.state_dict() for search in searches]
                file.save({"searches": states, "halving": halving.state_dict()})
            if config.race and stop < config.steps and not halving.decided(stop):
                _stop_labels(searches, halving, stop, config, bar)
    triggers = {}
    for search in searches:
        assert search.state is not None
        triggers[search.label] = task.trigger(search.label, search.state).cpu()
    file.remove()
    residuals = {label: trigger.residual_norm for label, trigger in triggers.items()}
    steps = {search.label: search.steps for search in searches}
    starved = {search.label: search.state.gradients.share for search in searches if search.state}
    scores = halving.compare(residuals)
    return SearchResult(triggers, scores, steps, dict(halving.stopped_at), starved)


def _groups(
    searches: Sequence[LabelSearch], halving: LabelHalving, stop: int, config: ReverseConfig
) -> Iterator[list[LabelSearch]]:
    """The labels that still have steps to take before ``stop``, in groups that fit the budget."""
    size = max(1, config.images_at_once // config.batch_size)
    searched = [s for s in searches if s.label not in halving.stopped_at and not s.finished]
    waiting = [search for search in searched if search.state is None or search.steps < stop]
    for begin in range(0, len(waiting), size):
        yield waiting[begin : begin + size]


def _stop_labels(
    searches: Sequence[LabelSearch],
    halving: LabelHalving,
    stop: int,
    config: ReverseConfig,
    bar: Progress[Any],
) -> None:
    """Decide at a milestone which labels stop, and drop their optimiser state."""
    for label in halving.stop(stop, {search.label: search.score for search in searches}):
        searches[label].moments = None
        if not searches[label].finished:
            bar.update(config.steps - stop)


class LabelSearch:
    """One label's search between two groups: everything that it resumes from.

    Args:
        others: int64 ``(M,)``, where the images of other classes are.
    """

    def __init__(self, label: int, others: Tensor, *, config: ReverseConfig, seed: int) -> None:
        self.label = label
        self.others = others
        self.batches = label_batches(others, config, seed)
        self.judged = round_subset(others, config.round_images, seed)
        self.state: LabelState | None = None  # None before the first group
        self.moments: Moments | None = None  # None before the first group and after the last
        self.steps = 0
        self._config = config

    def __repr__(self) -> str:
        return f"LabelSearch({self.label}, steps={self.steps}, score={self.score:.4g})"

    @property
    def score(self) -> float:
        """The smallest residual at the success floor so far; infinite where there is none."""
        return float("inf") if self.state is None else self.state.score

    @property
    def finished(self) -> bool:
        """Whether it stopped by itself."""
        return self.state is not None and self.state.finished

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "batches": self.batches.state_dict(),
            "state": None if self.state is None else self.state.state_dict(),
            "moments": None if self.moments is None else tuple(self.moments),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from the state of another search."""
        self.batches.load_state_dict(state["batches"])
        self.steps = state["steps"]
        if state["state"] is not None:
            rate, residual, weights = state["state"]["candidates"][0]
            self.state = LabelState(self._config, Candidate(rate, residual, weights.to(device)))
            self.state.load_state_dict(state["state"])
        if state["moments"] is not None:
            self.moments = Moments(*(part.to(device) for part in state["moments"]))


class GroupTrainer:
    """Trains the generators of a group of labels in the same steps."""

    def __init__(self, task: ScanTask) -> None:
        # A copy with channels-last kernels, as the images are: a third less time on a CPU.
        self._model = channels_last(copy.deepcopy(task.inputs.model))
        self._images = task.images
        self._start, self._config = task.start, task.config
        self._loss = reconstruction(task.config, self._images.device)

    @torch.enable_grad()
    def train(self, group: list[LabelSearch], stop: int, bar: Progress[Any]) -> None:
        """Train to step ``stop``; labels that finish on the way leave the group."""
        step, config = group[0].steps, self._config
        rows = [search.moments or initial_moments(self._start) for search in group]
        stack = GeneratorStack(self._start, rows, steps=step, config=config)
        for row, search in enumerate(group):
            if search.state is None:
                search.state = LabelState(config, self._candidate(stack, row, search))
                self._count(stack, row, search)
        while step < stop:
            step += 1
            self._step(stack, group)
            bar.update(len(group))
            if step % config.round_steps and step < config.steps:
                continue
            for row, search in enumerate(group):
                assert search.state is not None
                search.state.update(self._candidate(stack, row, search))
                self._count(stack, row, search)
                search.steps = step
            unfinished = [row for row, search in enumerate(group) if not search.finished]
            if len(unfinished) < len(group):
                bar.update((len(group) - len(unfinished)) * (config.steps - step))
                for search in group:
                    search.moments = None
                if not unfinished:
                    return
                group, stack = [group[row] for row in unfinished], stack.select(unfinished)
        for row, search in enumerate(group):
            search.moments = stack.moments(row) if step < config.steps else None

    def _step(self, stack: GeneratorStack, group: list[LabelSearch]) -> None:
        """One step of every label: its own batch, its own lambda_1, one pass of the classifier."""
        # L times (B,), and M is the sum of all B.
        drawn = [search.others[next(search.batches)] for search in group]
        sizes = torch.tensor([len(indices) for indices in drawn])  # (L,)
        device = self._images.device
        batch = self._images[torch.cat(drawn).to(device)]  # (M, C, H, W)
        with autocast(self._config, device):
            generated = torch.cat(stack.generate(batch.split(sizes.tolist())))  # (M, C, H, W)
            logits = self._model(generated)  # (M, K)
        goals = torch.tensor([s.label for s in group]).repeat_interleave(sizes).to(device)  # (M,)
        values = [search.state.search.value for search in group if search.state is not None]
        weight = torch.tensor(values).repeat_interleave(sizes).to(device)  # (M,)
        attack = F.cross_entropy(logits.float(), goals, reduction="none")  # (M,)
        each = weight * attack + self._loss(generated, batch)  # (M,)
        # The sum of the labels' means: no label's gradient depends on another label.
        stack.step((each / sizes.repeat_interleave(sizes).to(device)).sum())

    def _candidate(self, stack: GeneratorStack, row: int, search: LabelSearch) -> Candidate:
        """A label's generator, measured on the images that rounds look at."""
        judged = self._images[search.judged.to(self._images.device)]
        with autocast(self._config, judged.device):
            rates = measure(
                *(stack.generator(row), self._model, judged, search.label),
                score=self._config.score,
            )
        return Candidate(*rates, stack.weights(row))

    def _count(self, stack: GeneratorStack, row: int, search: LabelSearch) -> None:
        """Look at the gradients that a label's next steps follow."""
        assert search.state is not None
        judged = self._images[search.judged.to(self._images.device)]
        with autocast(self._config, judged.device):
            counts = count_gradients(stack.generator(row), self._model, judged, search.label)
        search.state.gradients.add(*counts)
