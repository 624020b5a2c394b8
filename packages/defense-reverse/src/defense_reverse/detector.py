"""Reversed generators as a detector: one generator per label, then one verdict."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.config import ReverseConfig
from defense_reverse.engines import search_in_turn, search_together
from defense_reverse.engines.task import ScanTask
from defense_reverse.reverse import pretrain

_ENGINES = {"together": search_together, "one-by-one": search_in_turn}


@dataclass(frozen=True)
class ReverseGenerator:
    """The generator-based detector of Zheng, Hua and Zhang as a `defense_nc.Detector`.

    Args:
        config: How generators are searched.
        alpha: Share of clean models that may be called backdoored, in (0, 1).
        max_ratio: Without a calibration, a suspected label's score is at most this share of the
            median, in (0, 1].
    """

    name: ClassVar[str] = "reverse-generator"
    config: ReverseConfig = field(default_factory=ReverseConfig)
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_rule(self.alpha, self.max_ratio)

    @classmethod
    def preset(
        cls, name: str = "fast", *, alpha: float = 0.05, max_ratio: float = 0.5, **changes: Any
    ) -> ReverseGenerator:
        """A preset of `ReverseConfig`, with changes of its fields."""
        return cls(ReverseConfig.preset(name, **changes), alpha, max_ratio)

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
        """Reverse a generator for every label, and decide whether one is unusually easy to reach.

        Images of a label are left out when its generator is sought.

        Returns:
            A report whose scores are the residuals of equation 5, as means per pixel in [0, 1],
            each at the same success floor and at equal effort; ``triggers`` holds a
            `ReversedTrigger` per label, on the CPU, with the residual as measured. ``log`` has the
            steps that each label took, and at which step it was stopped.

        Raises:
            ValueError: As `Detector.scan`.
            LpipsUnavailable: lambda_3 > 0, and no LPIPS weights.

        Source: sections 3.3 and 3.4. The verdict rests on `judge_scan`; equation 6 is in the report
            beside it.
        """
        search = _ENGINES[self.config.engine]
        with open_scan(model, images, labels=labels, device=device) as inputs:
            start = pretrain(inputs.images, config=self.config, seed=seed, progress=progress)
            task = ScanTask(inputs, self.config, start, seed)
            result = search(task, progress=progress, checkpoint=checkpoint)
        rates = [trigger.success_rate for trigger in result.triggers.values()]
        report = judge_scan(
            self.name,
            torch.tensor([result.scores[label] for label in result.triggers]).double(),
            torch.tensor(rates).double(),
            model=model,
            images=images,
            settings=self.settings,
            floor=self.config.compared_from,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers=result.triggers,
            seed=seed,
            starved=[result.starved[label] for label in result.triggers],
            notes=inputs.notes,
        )
        log = {
            "label_steps": [result.steps[label] for label in result.triggers],
            "left_at": {str(label): step for label, step in result.stopped_at.items()},
        }
        return replace(report, log=log)


def detection_case(flagged: Collection[int], target: int) -> int:
    """Which of the paper's four outcomes a scan of a backdoored model is.

    1: only the target is named. 2: the target and other labels are. 3: only other labels are.
    4: nothing is. Source: section 4.2.

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
