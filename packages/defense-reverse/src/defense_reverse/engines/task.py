"""What an engine is given, what it returns, and the file that a killed scan resumes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from defense_nc.scan_inputs import ScanInputs
from defense_reverse.config import ReverseConfig
from defense_reverse.engines.stack import with_weights
from defense_reverse.generator import UNetGenerator
from defense_reverse.label_state import LabelState, measure
from defense_reverse.trigger import ReversedTrigger
from wm_inject.core.resume import ResumeFile, fingerprint


class SearchResult(NamedTuple):
    """The searches of all labels, each by label."""

    triggers: dict[int, ReversedTrigger]  # on the CPU
    scores: dict[int, float]  # residuals at equal effort, see `LabelHalving.compare`
    steps: dict[int, int]
    stopped_at: dict[int, int]  # only labels that were stopped early: at which step
    starved: dict[int, float]  # `GradientCount.share`


class ScanTask(NamedTuple):
    """One scan: everything that decides its result."""

    inputs: ScanInputs
    config: ReverseConfig
    start: UNetGenerator  # the generator that all labels start from; not changed
    seed: int = 0

    @property
    def images(self) -> Tensor:
        """The images, channels last."""
        return self.inputs.images.contiguous(memory_format=torch.channels_last)

    def others(self, label: int) -> Tensor:
        """Where the images are that are not of this class, int64 on the CPU."""
        return (self.inputs.labels.cpu() != label).nonzero().flatten()

    def trigger(self, label: int, state: LabelState) -> ReversedTrigger:
        """The trigger of a label's best generator, measured in float32 on all images."""
        images = self.images[self.others(label).to(self.inputs.images.device)]

        def on_all(weights: Tensor) -> tuple[float, float]:
            generator = with_weights(self.start, weights)
            return measure(generator, self.inputs.model, images, label, score=self.config.score)

        best = state.best(on_all)
        return ReversedTrigger(
            with_weights(self.start, best.weights),
            target=label,
            success_rate=best.success_rate,
            residual_norm=best.residual,
        )

    def resume_file(self, path: Path | None) -> ResumeFile:
        """The file of this scan's state; that of another scan is refused."""
        run: dict[str, Any] = {}
        if path is not None:
            networks = (self.inputs.model.state_dict(), self.start.state_dict())
            run = {
                "config": json.loads(json.dumps(asdict(self.config))),
                "seed": self.seed,
                "data": fingerprint(self.inputs.images, self.inputs.labels),
                "networks": fingerprint(*(t for state in networks for t in state.values())),
            }
        return ResumeFile(path, kind="reverse-scan", run=run)
