"""What detectors by universal changes share: every label's smallest change, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from defense_nc.config import check_rule
from defense_nc.scan_inputs import ScanInputs, open_scan
from defense_nc.verdict import ScanReport, judge_scan
from defense_reverse.detectors.change_search import (
    SearchSettings,
    SmallChange,
    smallest_changes,
    split_group,
)
from defense_reverse.detectors.common import check_settings, rows_by_label


class Universal(NamedTuple):
    """The changes of all labels."""

    changes: Tensor  # float32 (K, ...)
    sizes: Tensor  # float64 (K,): root mean square of each
    rates: Tensor  # float64 (K,): success on images that were not searched with
    starved: tuple[float, ...]  # by label: as `ScanReport.starved`


@dataclass(frozen=True)
class UniversalChange:
    """Universal changes of one kind as a `defense_nc.Detector`; see the two derived from it."""

    name: ClassVar[str]
    compares_all: ClassVar[bool] = False  # a label that no change reaches has a score as well
    steps: int = 25
    batch_size: int = 24
    tested: int = 50
    start: float = 2 / 255
    floor: float = 0.8
    alpha: float = 0.05
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, ("steps", "batch_size", "tested"), ("start",))
        if not 0 < self.floor <= 1:
            raise ValueError(f"expected a floor in (0, 1], got {self.floor}")
        check_rule(self.alpha, self.max_ratio)

    @property
    def search_settings(self) -> SearchSettings:
        """Those of the search; they say what changes do to images."""
        return SearchSettings(self.steps, self.batch_size, self.start, self.floor)

    def trigger(self, change: Tensor) -> nn.Module:
        """The change as a Trigger."""
        raise NotImplementedError

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the search, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("alpha", "max_ratio")}

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
        """Find every label's change, and decide whether one is unusually small.

        A ``checkpoint`` holds the labels that are done. It stays after the last one, so that the
        same scan again costs nothing.

        Returns:
            A report with `scores`, whose triggers make the changes.
        """
        with open_scan(model, images, labels=labels, device=device) as inputs:
            found = self.search(inputs, seed=seed, progress=progress, checkpoint=checkpoint)
        return judge_scan(
            self.name,
            self.scores(found),
            found.rates,
            model=model,
            images=images,
            settings=self.settings,
            floor=0.0 if self.compares_all else self.floor,
            works=self.floor,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers={k: self.trigger(change) for k, change in enumerate(found.changes)},
            seed=seed,
            starved=found.starved,
            notes=inputs.notes,
        )

    def scores(self, found: Universal) -> Tensor:
        """The scores of all labels, float64 ``(K,)``."""
        return found.sizes

    def search(
        self,
        inputs: ScanInputs,
        *,
        seed: int,
        progress: bool = False,
        checkpoint: Path | None = None,
    ) -> Universal:
        """The smallest change found for every label; ``checkpoint`` as for `scan`.

        Raises:
            ValueError: A checkpoint that is damaged or belongs to another scan.
        """
        rows = rows_by_label(
            inputs,
            lambda label, random: self._change(inputs, label, random).stored(),
            kind=self.name,
            settings=self.settings,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        changes, sizes, rates, starved_shares = zip(*rows, strict=True)
        return Universal(
            torch.stack(changes).to(inputs.images.device),
            torch.tensor(sizes, dtype=torch.float64),
            torch.tensor(rates, dtype=torch.float64),
            starved_shares,
        )

    def _change(self, inputs: ScanInputs, label: int, random: torch.Generator) -> SmallChange:
        """A label's change."""
        others = inputs.images[inputs.labels != label]
        goals = torch.full((len(others),), label, device=others.device)
        group = split_group(others, goals, self.tested, random)
        return smallest_changes(inputs.model, [group], self.search_settings, random)[0]
