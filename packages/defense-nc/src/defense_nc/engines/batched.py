"""Trigger inversion for many labels at once; labels that cannot be outliers stop early."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from defense_nc.config import NCConfig
from defense_nc.engines.candidates import check_inputs, conclude
from defense_nc.engines.search_rows import Forward, Search, advance
from defense_nc.engines.stopping_rules import nc_halving, stopping_starts
from defense_nc.gradients import GradientCount
from defense_nc.scan_inputs import ScanInputs
from defense_nc.trigger import Inverted
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import ResumeFile, fingerprint
from wm_victim.forward_fusion import fused_forward
from wm_victim.inference import frozen

_PAUSE = 30.0  # seconds between two checkpoints


def invert_triggers(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | None = None,
    *,
    config: NCConfig | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Path | None = None,
) -> Inverted:
    """Find the smallest mask and pattern for many labels, in one pass through the victim for all.

    Every search (a label, a start) keeps its own batches, cost, optimiser and early stop: without
    the stopping of labels and in float32, each label gets what `invert_trigger` finds for it.

    Args:
        targets: The labels to reach, each once; all K if None.

    Returns:
        One trigger a label, in the order of the targets. The score of a label that stopped early is
        its norm times what the control labels gained since.

    Raises:
        ValueError: Bad images, labels or targets, no image of another class than a target, or a
            checkpoint of another run.

    Source: Neural Cleanse, equation 3 and released code; batching and early stopping are ours.
    """
    config = NCConfig() if config is None else config
    with frozen(model):
        labels, targets = check_inputs(model, images, labels, targets)
        inputs = ScanInputs(model, images, labels, 0)
        return invert_labels(
            inputs, targets, config=config, seed=seed, progress=progress, checkpoint=checkpoint
        )


def invert_labels(
    inputs: ScanInputs,
    targets: Sequence[int],
    *,
    config: NCConfig,
    seed: int,
    progress: bool,
    checkpoint: Path | None,
) -> Inverted:
    """`invert_triggers` for inputs that are checked and a model that is frozen."""
    model, images, labels = inputs[:3]
    searches = [
        Search(
            target,
            start,
            pool=(labels != target).nonzero().flatten().cpu(),
            shape=images.shape[1:],
            device=images.device,
            config=config,
            seed=seed + start,
        )
        for target in targets
        for start in range(len(config.starts))
    ]
    file = _resume_file(checkpoint, inputs, targets, config, seed)
    run = _Run(searches, config, file)
    run.go(fused_forward(model, config.precision, images.device), images, progress=progress)
    triggers = []
    for target in targets:
        own = [search for search in searches if search.label == target]
        candidates = [one for search in own for one in search.candidates()]
        others = images[labels != target]
        trigger = conclude(model, others, target, candidates, floor=config.floor)
        trigger.steps = sum(search.steps for search in own)
        triggers.append(trigger)
    file.remove()
    starved = []
    for target in targets:
        counts = [search.gradients for search in searches if search.label == target]
        starved.append(sum(counts, GradientCount()).share)
    gains = run.halving.gains(run.scores())
    stopped_at = run.halving.stopped_at
    return Inverted(
        tuple(triggers),
        tuple(trigger.l1_norm * gains.get(trigger.target, 1.0) for trigger in triggers),
        {
            "left_at": [stopped_at.get(target) for target in targets],
            "gain": [gains.get(target, 1.0) for target in targets],
            "stopped_at": run.all_stopped_at,
            "steps": [trigger.steps for trigger in triggers],
        },
        tuple(starved),
    )


def _resume_file(
    path: Path | None, inputs: ScanInputs, targets: Sequence[int], config: NCConfig, seed: int
) -> ResumeFile:
    run: dict[str, Any] = {}
    if path is not None:
        tensors = (*inputs.model.state_dict().values(), inputs.images, inputs.labels)
        settings = json.loads(json.dumps(asdict(config)))
        run = {"data": fingerprint(*tensors), "config": settings, "seed": seed}
        run["targets"] = list(targets)
    return ResumeFile(path, kind="neural-cleanse-scan", run=run, pause=_PAUSE)


class _Run:
    """The searches on their way from milestone to milestone, and their checkpoint."""

    def __init__(self, searches: list[Search], config: NCConfig, file: ResumeFile) -> None:
        self.searches, self.config, self._file = searches, config, file
        self.halving = nc_halving(config)
        early = [step for step in config.milestones if config.race and step < config.steps]
        self._legs = [*early, config.steps]
        self._leg = 0
        self._order = list(range(len(searches)))  # those in the batch first
        state = file.load()
        if state is not None:
            self._leg, self._order = state["leg"], state["order"]
            self.halving.load_state_dict(state["halving"])
            for search, own in zip(searches, state["searches"], strict=True):
                search.load_state_dict(own)

    def go(self, forward: Forward, images: Tensor, *, progress: bool) -> None:
        """Take every search to its end."""
        rows = {id(search): row for row, search in enumerate(self.searches)}
        total = self.config.steps * len(self.searches)
        bar: Progress[None] = show_progress(total=total, desc="searches", enabled=progress)
        with bar:
            bar.update(sum(search.steps for search in self.searches))
            while self._leg < len(self._legs):
                until = self._legs[self._leg]
                queue = [self.searches[row] for row in self._order]
                for live in advance(forward, images, queue, until, config=self.config):
                    bar.update(len(live))
                    first = [rows[id(search)] for search in live]
                    self._file.save_sometimes(partial(self._state, first))
                if until != self._legs[-1]:
                    self._stop(until)
                self._leg, self._order = self._leg + 1, list(range(len(self.searches)))
                bar.set_postfix(labels=float(len(self.scores()) - len(self.halving.stopped_at)))

    def scores(self) -> dict[int, float]:
        """The smallest norm of every label's searches."""
        scores: dict[int, float] = {}
        for search in self.searches:
            scores[search.label] = min(search.norm, scores.get(search.label, search.norm))
        return scores

    @property
    def all_stopped_at(self) -> int | None:
        """The milestone at which all labels stopped because nothing stood out."""
        stopped_at, scores = self.halving.stopped_at, self.scores()
        if min(scores.values()) == float("inf") or scores.keys() - stopped_at.keys():
            return None
        return max(stopped_at.values())

    def _stop(self, until: int) -> None:
        searched = [search for search in self.searches if not search.stopped]
        if not searched:
            return
        self.halving.stop(until, self.scores())
        last = until == self.config.milestones[-1]
        for label in {search.label for search in searched}:
            own = [search for search in searched if search.label == label]
            ends = own if label in self.halving.stopped_at else stopping_starts(own, last=last)
            for search in ends:
                search.stopped = True

    def _state(self, live: list[int]) -> dict[str, Any]:
        inside = set(live)
        waiting = [row for row in range(len(self.searches)) if row not in inside]
        return {
            "leg": self._leg,
            "order": [*live, *waiting],
            "halving": self.halving.state_dict(),
            "searches": [search.state_dict() for search in self.searches],
        }
