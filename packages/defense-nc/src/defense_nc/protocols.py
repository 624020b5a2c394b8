"""What every detector of backdoored models and every mitigation looks like from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from defense_nc.verdict import ScanReport
from wm_inject.core.plan import Trigger


class Detector(Protocol):
    """Scans a classifier for a backdoor. Each is a frozen dataclass of settings.

    - One without need of images ignores them, and may declare ``images: Tensor | None = None``.
    - One that looks at features cuts the classifier into features and head itself
      (`wm_victim.activations`), at a layer of its settings where it cannot choose one.
    - Scores need not be one a label: with `LabelScore.source` a score is that of a pair of labels,
      and `ScanReport.model_score` is that of the whole model (``labels`` may then be empty).
    """

    @property
    def name(self) -> str:
        """The method's name in records and calibrations, for example "neural-cleanse"."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the scores, ready for JSON; calibrations hold for these only."""

    @classmethod
    def preset(cls, name: str = "fast", **changes: Any) -> Self:
        """Named settings with some of them changed; every detector has "paper" and "fast"."""

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
        """Scan a classifier with the defender's clean images, of at least two classes.

        A detector that cannot continue a scan ignores ``checkpoint``.

        Raises:
            ValueError: Bad images or labels, a model that the detector cannot take, or a
                checkpoint that is damaged or belongs to another scan.
        """


class Repaired(NamedTuple):
    """A repaired classifier, and how it came about."""

    model: nn.Module  # a new one, in eval mode, on the device of the original
    log: Mapping[str, Any]  # ready for JSON: losses, what was pruned, thresholds chosen


class Mitigator(Protocol):
    """Repairs a classifier with clean images. Each is a frozen dataclass of settings.

    The original stays bit-identical, and the same seed gives the same repaired copy.
    """

    @property
    def name(self) -> str:
        """The method's name in records and tables, for example "fine-tuning"."""

    def repair(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        triggers: Mapping[int, Trigger] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Repaired:
        """Repair a copy of ``model`` with at least 2 clean images and their true labels.

        ``triggers`` are the reversed triggers of the suspected labels, by label; blind mitigations
        ignore them.
        """
