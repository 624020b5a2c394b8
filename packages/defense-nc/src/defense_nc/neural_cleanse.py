"""Neural Cleanse as a detector: one reversed trigger per label, then one verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_nc.config import NCConfig, check_rule
from defense_nc.engines.batched import invert_labels
from defense_nc.engines.sequential import invert_in_turn
from defense_nc.scan_inputs import open_scan
from defense_nc.verdict import ScanReport, judge_scan


@dataclass(frozen=True)
class NeuralCleanse:
    """Neural Cleanse (Wang 2019) as a `Detector`.

    Args:
        config: How triggers are searched.
        alpha: Share of clean models that may be called backdoored, in (0, 1).
        max_ratio: Without a calibration, a suspected label's score is at most this share of the
            median, in (0, 1].
    """

    config: NCConfig = field(default_factory=NCConfig)
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(
        cls, name: str = "fast", *, alpha: float = 0.05, max_ratio: float = 0.5, **changes: Any
    ) -> NeuralCleanse:
        """A preset of `NCConfig`, with changes of its fields."""
        return cls(NCConfig.preset(name, **changes), alpha, max_ratio)

    @property
    def name(self) -> str:
        """The method's name in records and calibrations."""
        return "neural-cleanse"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The search settings, ready for JSON."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        return settings

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Reverse a trigger for every label, and decide whether one is unusually easy to reach.

        Images of a label are left out when its trigger is sought.

        Returns:
            A report whose scores are the L1 norms of the masks, in pixels, at the effort of the
            labels that were searched longest; ``triggers`` holds an `InvertedTrigger` per label, on
            the CPU, and ``log["race_log"]`` when each label was stopped.

        Source: Neural Cleanse, section IV. The verdict rests on `judge_scan`; the paper's own rule
            is in the report beside it.
        """
        invert = invert_in_turn if self.config.engine == "single" else invert_labels
        with open_scan(model, images, labels=labels, device=device) as inputs:
            inverted = invert(
                inputs,
                range(inputs.num_classes),
                config=self.config,
                seed=seed,
                progress=progress,
                checkpoint=checkpoint,
            )
        triggers = {trigger.target: trigger.cpu() for trigger in inverted.triggers}
        rates = [trigger.success_rate for trigger in triggers.values()]
        report = judge_scan(
            self.name,
            torch.tensor(inverted.scores, dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            model=model,
            images=images,
            settings=self.settings,
            floor=self.config.floor,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers=triggers,
            seed=seed,
            starved=inverted.starved,
            notes=inputs.notes,
        )
        return replace(report, log={"race_log": inverted.race})
