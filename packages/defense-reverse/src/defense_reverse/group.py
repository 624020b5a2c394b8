"""One group of labels: what each takes along, and the training of all in the same steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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
from defense_reverse.stacked import Moments, Stack, fresh
from wm_inject.core.progress import Progress
from wm_victim.compiled_forward import channels_last


class LabelRun:
    """What one label takes along from one stage to the next.

    Args:
        label: The label.
        others: int64 ``(M,)``, where the images of other classes are.
        config: Settings.
        seed: Seeds the order of the images.
    """

    def __init__(self, label: int, others: Tensor, *, config: ReverseConfig, seed: int) -> None:
        self.label, self.others = label, others
        self.batches = Batches(others, config.batch_size, seed)
        self.judged = round_subset(others, config.round_images, seed)
        self.record: LabelRecord | None = None  # None before the first stage
        self.moments: Moments | None = None  # None before the first stage, and when all is over
        self.steps = 0
        self._config = config

    def __repr__(self) -> str:
        return f"LabelRun({self.label}, steps={self.steps}, score={self.score:.4g})"

    @property
    def score(self) -> float:
        """The smallest residual at the success floor so far; infinite where there is none."""
        return float("inf") if self.record is None else self.record.score

    @property
    def finished(self) -> bool:
        """Whether it stopped by itself."""
        return self.record is not None and self.record.finished

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "batches": self.batches.state(),
            "record": None if self.record is None else self.record.state(),
            "moments": None if self.moments is None else tuple(self.moments),
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        self.batches.restore(state["batches"])
        self.steps = state["steps"]
        if state["record"] is not None:
            found = [(rate, change, w.to(device)) for rate, change, w in state["record"]["found"]]
            self.record = LabelRecord(self._config, Found(*found[0]))
            self.record.restore({**state["record"], "found": found})
        if state["moments"] is not None:
            self.moments = Moments(*(part.to(device) for part in state["moments"]))


class GroupTrainer:
    """Trains the generators of a group of labels in the same steps.

    Args:
        model: Images in [0, 1] to logits, in eval mode and frozen.
        images: float32 ``(N, C, H, W)``, channels last.
        start: The generator that all labels start from.
        config: Settings.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, *, start: UNetGenerator, config: ReverseConfig
    ) -> None:
        # A copy with channels-last kernels, as the images are: a third less time on a CPU.
        self._model = channels_last(copy.deepcopy(model))
        self._images = images
        self._start, self._config = start, config
        self._loss = reconstruction(config, images.device)

    @torch.enable_grad()
    def train(self, group: list[LabelRun], stop: int, bar: Progress[Any]) -> None:
        """Train to step ``stop``; labels that finish on the way leave the group."""
        step, config = group[0].steps, self._config
        rows = [run.moments or fresh(self._start) for run in group]
        stack = Stack(self._start, rows, taken=step, config=config)
        for row, run in enumerate(group):
            if run.record is None:
                run.record = LabelRecord(config, self._look(stack, row, run))
        while step < stop:
            step += 1
            self._step(stack, group)
            bar.update(len(group))
            if step % config.round_steps and step < config.steps:
                continue
            for row, run in enumerate(group):
                assert run.record is not None
                run.record.take(self._look(stack, row, run))
                run.steps = step
            going = [row for row, run in enumerate(group) if not run.finished]
            if len(going) < len(group):
                bar.update((len(group) - len(going)) * (config.steps - step))
                for run in group:
                    run.moments = None
                if not going:
                    return
                group, stack = [group[row] for row in going], stack.keep(going)
        for row, run in enumerate(group):
            run.moments = stack.moments(row) if step < config.steps else None

    def _step(self, stack: Stack, group: list[LabelRun]) -> None:
        """One step of every label: its own batch, its own lambda_1, one pass of the classifier."""
        drawn = [run.batches.draw() for run in group]
        sizes = torch.tensor([len(indices) for indices in drawn])
        place = self._images.device
        batch = self._images[torch.cat(drawn).to(place)]
        with autocast(self._config, place):
            generated = torch.cat(stack.generate(batch.split(sizes.tolist())))
            logits = self._model(generated)
        goals = torch.tensor([run.label for run in group]).repeat_interleave(sizes).to(place)
        weights = [run.record.search.value for run in group if run.record is not None]
        weight = torch.tensor(weights).repeat_interleave(sizes).to(place)
        attack = F.cross_entropy(logits.float(), goals, reduction="none")
        each = weight * attack + self._loss(generated, batch)  # (sum of sizes,)
        # The sum of the labels' means: no label's gradient knows of another label.
        stack.step((each / sizes.repeat_interleave(sizes).to(place)).sum())

    def _look(self, stack: Stack, row: int, run: LabelRun) -> Found:
        """What a label's generator does to the images that rounds look at."""
        judged = self._images[run.judged.to(self._images.device)]
        with autocast(self._config, judged.device):
            rates = measure(
                stack.generator(row), self._model, judged, run.label, score=self._config.score
            )
        return Found(*rates, stack.weights(row))
