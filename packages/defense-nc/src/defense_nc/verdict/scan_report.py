"""The result of a scan: scores, both decision rules, and one verdict with its reason."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from defense_nc.verdict.calibration import Calibration
from defense_nc.verdict.model_info import ModelInfo


class Verdict(enum.StrEnum):
    """The answer of a scan; a command exits with its code."""

    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    NOT_SCANNED = "not-scanned"

    @property
    def exit_code(self) -> int:
        """0 clean, 1 backdoored, 2 inconclusive, 3 not scanned."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class LabelScore:
    """One label of a scan. A small score means that it is easy to reach."""

    label: int
    score: float
    success_rate: float  # of the reversed trigger, on images of other classes, in [0, 1]
    p_value: float  # of the deciding rule, multiplicity included; 1 if not converged
    paper_index: float  # of the papers' rule; 0 above the median
    ratio: float  # score / median of the converged labels
    converged: bool  # the success rate reached the floor, so the score may be compared
    source: int | None = None  # the score is of this class's images only; None: of all others'


class Finding(NamedTuple):
    """What a detector found by a rule of its own, beside the comparison of labels."""

    labels: tuple[int, ...]  # what it accuses; at least one
    reason: str  # a sentence


@dataclass(frozen=True)
class ScanReport:
    """Scores, both rules and the verdict of one scan of one classifier."""

    detector: str
    verdict: Verdict
    labels: tuple[LabelScore, ...]
    paper_index: float  # of the model, ordinary median
    paper_index_low: float  # of the model, lower median, as the PyTorch ports compute it
    paper_flagged: tuple[int, ...]  # paper_index > 2: the papers' verdict, ordinary median
    p_value: float  # the smallest of the labels
    suspected: tuple[int, ...]
    alpha: float
    max_ratio: float  # without a calibration, a suspected score is at most this of the median
    reason: str
    triggers: Mapping[int, nn.Module] = field(repr=False, compare=False)
    config: Mapping[str, Any]
    seed: int
    floor: float = 0.0  # success rate that made a score comparable
    works: float = 0.0  # success rate below which no label is suspected, whatever its score
    calibrated: bool = False  # p-values hold on clean models like those of the calibration
    calibration: Calibration | None = field(default=None, repr=False, compare=False)
    subject: ModelInfo | None = None
    repeats: int = 1  # scans behind the scores
    log: Mapping[str, Any] = field(default_factory=dict)  # of the search, ready for JSON
    model_score: float | None = None  # of the model as a whole, where a detector gives one
    # By label: of the search's images not yet there, the share whose gradients had vanished. A
    # search that was starved so and failed leaves the model not scanned.
    starved: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()  # what was done to the model's outputs, one line each
    finding: Finding | None = None  # it decides, whatever the scores are

    @property
    def nearest(self) -> int:
        """The label that stands out most: of equal p-values, that with the smallest score."""
        return min(self.labels, key=lambda label: (label.p_value, label.score)).label

    def to_dict(self) -> dict[str, Any]:
        """Everything but the triggers, ready for JSON; an infinite index is written as None."""
        names = "detector paper_index paper_index_low p_value alpha max_ratio reason seed"
        names += " floor calibrated repeats"
        out: dict[str, Any] = {name: _finite(getattr(self, name)) for name in names.split()}
        out["verdict"] = self.verdict.value
        out["paper_flagged"], out["suspected"] = list(self.paper_flagged), list(self.suspected)
        out["config"] = {**self.config, **self.log}
        out["calibration"] = self.calibration and self.calibration.fingerprint
        out["subject"] = self.subject and self.subject.to_dict()
        out["labels"] = [
            {name: _finite(value) for name, value in vars(label).items() if name != "source"}
            | ({} if label.source is None else {"source": label.source})
            for label in self.labels
        ]
        out["starved"], out["notes"] = list(self.starved), list(self.notes)
        if self.finding is not None:
            out["finding"] = {**self.finding._asdict(), "labels": list(self.finding.labels)}
        if self.model_score is not None:
            out["model_score"] = _finite(self.model_score)
        return out


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
