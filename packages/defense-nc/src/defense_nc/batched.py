"""Trigger inversion for many labels at once: one stack of searches, and a race between labels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from defense_nc.race import Race, Standing
from defense_nc.scan_inputs import ScanInputs
from defense_nc.schedule import NCConfig
from defense_nc.search import check_inputs, conclude
from defense_nc.stack import Search, advance
from defense_nc.trigger import Inverted
from wm_inject.core.progress import Progress
from wm_inject.core.progress import progress as show_progress
from wm_inject.core.resume import fingerprint, load_state, save_state
from wm_victim.compiled_forward import fused_forward
from wm_victim.inference import frozen

_KIND = "neural-cleanse-scan"
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

    Every search (a label, a start) keeps its own batches, cost, optimiser and early stop: with the
    race off and in float32, each label gets what `invert_trigger` finds for it.

    Args:
        model: Images in [0, 1] to logits ``(N, K)``; used in eval mode, given back as it came.
        images: Clean float32 ``(N, C, H, W)`` in [0, 1], on the model's device.
        targets: The labels to reach, each once; all K if None.
        config: Settings.
        labels: int64 ``(N,)``: the true classes, or the model's own answers if None. Images of a
            label are left out when its trigger is sought.
        seed: Seeds every label's starts and order of images alike.
        progress: Show how far it is.
        checkpoint: Keep the state of the searches in this file, go on from it if it is there, and
            delete it in the end. A run that was stopped ends in the same bytes.

    Returns:
        One trigger a label, in the order of the targets, with scores and the course of the race.
        The score of a label that left the race is its norm times what the bulk gained since.

    Raises:
        ValueError: Bad images, labels or targets, no image of another class than a target, or a
            checkpoint of another run.

    Source: Neural Cleanse, equation 3 and released code; the stack and the race are ours.
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
    model, images, labels, _ = inputs
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
    run = _Run(searches, Race(config), config)
    if checkpoint is not None:
        data = fingerprint(*model.state_dict().values(), images, labels)
        run.keep(checkpoint, {"seed": seed, "subject": data})
    run.go(fused_forward(model, config.precision, images.device), images, progress=progress)
    triggers = []
    for target in targets:
        own = [search for search in searches if search.label == target]
        candidates = [one for search in own for one in search.candidates()]
        others = images[labels != target]
        trigger = conclude(model, others, target, candidates, floor=config.floor)
        trigger.steps = sum(search.steps for search in own)
        triggers.append(trigger)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    gains = [run.race.gains.get(target, 1.0) for target in targets]
    return Inverted(
        tuple(triggers),
        tuple(trigger.l1_norm * gain for trigger, gain in zip(triggers, gains, strict=True)),
        {
            "left_at": [run.race.left_at.get(target) for target in targets],
            "gain": gains,
            "stopped_at": run.race.stopped_at,
            "steps": [trigger.steps for trigger in triggers],
        },
    )


class _Run:
    """The searches on their way through the race, and their checkpoint."""

    def __init__(self, searches: list[Search], race: Race, config: NCConfig) -> None:
        self.searches, self.race, self.config = searches, race, config
        met = [step for step in config.milestones if config.race and step < config.steps]
        self.legs = [*met, config.steps]
        self.leg = 0
        self.order = list(range(len(searches)))  # those in the stack first
        self._path: Path | None = None
        self._about: dict[str, Any] = {}
        self._saved = time.monotonic()

    def go(self, passes: Callable[[Tensor], Tensor], images: Tensor, *, progress: bool) -> None:
        """Take every search to its end."""
        places = {id(search): place for place, search in enumerate(self.searches)}
        total = self.config.steps * len(self.searches)
        bar: Progress[None] = show_progress(total=total, desc="searches", enabled=progress)
        with bar:
            bar.update(sum(search.steps for search in self.searches))
            while self.leg < len(self.legs):
                until = self.legs[self.leg]
                queue = [self.searches[place] for place in self.order]
                for live in advance(passes, images, queue, until, config=self.config):
                    bar.update(len(live))
                    self._save([places[id(search)] for search in live])
                self._cull(until)
                bar.set_postfix(labels=float(len({s.label for s in self._racing()})))
        self.race.finish(self._standings())

    def keep(self, path: Path, about: dict[str, Any]) -> None:
        """Keep the state in a file from now on, and go on from it if it is there."""
        settings = json.loads(json.dumps(asdict(self.config)))
        who = [[search.label, search.start] for search in self.searches]
        self._path, self._about = path, {**about, "config": settings, "searches": who}
        state = load_state(path, kind=_KIND, run=self._about)
        if state is None:
            return
        self.leg, self.order = state["leg"], state["order"]
        self.race.load_state_dict(state["race"])
        for search, one in zip(self.searches, state["searches"], strict=True):
            search.load_state_dict(one)

    def _cull(self, until: int) -> None:
        racing = self._standings()
        if until != self.legs[-1] and racing:
            leaving = self.race.cull(until, racing)
            for search in self._racing():
                search.left = (search.label, search.start) in leaving
        self.leg, self.order = self.leg + 1, list(range(len(self.searches)))

    def _racing(self) -> list[Search]:
        return [search for search in self.searches if not search.left]

    def _standings(self) -> list[Standing]:
        return [Standing(s.label, s.start, s.norm, s.success) for s in self._racing()]

    def _save(self, live: list[int]) -> None:
        """Write the state, now and then: what is written when does not change the result."""
        if self._path is None or time.monotonic() - self._saved < _PAUSE:
            return
        inside = set(live)
        rest = [place for place in range(len(self.searches)) if place not in inside]
        state = {
            "leg": self.leg,
            "order": [*live, *rest],
            "race": self.race.state_dict(),
            "searches": [search.state_dict() for search in self.searches],
        }
        save_state(self._path, state, kind=_KIND, run=self._about)
        self._saved = time.monotonic()
