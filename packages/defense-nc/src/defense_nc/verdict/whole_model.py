"""The whole model: are added pictures worth more in it than patches let expect?

A backdoor with a trigger for every label makes all of them easy, and none stands out. Clean
networks differ in how easily they are fooled as well, but then by patches and by added pictures
alike. So the level of one detector's scores is judged by another's, on a line that clean models
give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from scipy.special import stdtr
from torch import Tensor

from defense_nc.verdict.calibration import Calibration, CleanModel, alike
from defense_nc.verdict.model_info import ModelInfo
from defense_nc.verdict.scan_report import ScanReport
from defense_nc.verdict.shrinkage import log_scores
from defense_nc.verdict.tail_fit import SMALLEST, Tail, fit_tail, tail_p_values

JUDGED, BY = "uap", "sweep"  # the detectors whose level is judged, and by whose
NO_LABEL = (
    "added pictures lead to every label more easily than patches let expect of a clean model, as "
    "with a trigger for each"
)
_MODELS = 20  # clean models that both have scanned, at least
_PEERS = 8  # with fewer clean models of the same shape, all are used
_LEAST = 1e-6  # deviation of a level from the line


class WholeModel(NamedTuple):
    """The null distribution of one detector's level, given another's."""

    pairs: tuple[tuple[CleanModel, CleanModel], ...]
    tail: Tail

    def p_value(self, judged: ScanReport, by: ScanReport) -> float:
        """How often a clean model's labels are as easy, in all, for what the other detector says.

        1 where one of the two reached no two labels.
        """
        level, other = _level(judged), _level(by)
        if level is None or other is None:
            return 1.0
        nominal = _below_the_line(level, other, judged.subject, self.pairs)
        return float(tail_p_values(_tensor([nominal]), self.tail))


@lru_cache(maxsize=64)
def fit_whole_model(judged: Calibration, by: Calibration) -> WholeModel | None:
    """The null from the clean models that both detectors have scanned; None with fewer than twenty.

    Each is judged by those of other networks: how easily a kind of network is fooled is its own.

    Source: ours, in neither paper.
    """
    others = {model.name: model for model in by.models}
    pairs = tuple((model, others[model.name]) for model in judged.models if model.name in others)
    if len(pairs) < _MODELS or len({model.arch for model, _ in pairs}) < 2:
        return None
    nominal = [
        _below_the_line(
            model.level,
            other.level,
            model.subject,
            [pair for pair in pairs if pair[0].arch != model.arch],
        )
        for model, other in pairs
    ]
    return WholeModel(pairs, fit_tail(_tensor(nominal)))


def whole_model_p_value(
    reports: Sequence[ScanReport], calibrations: Sequence[Calibration]
) -> float | None:
    """Of several scans of one model; None if the two that it takes are not among them."""
    by_name = {c.detector: (r, c) for r, c in zip(reports, calibrations, strict=True)}
    if JUDGED not in by_name or BY not in by_name:
        return None
    (judged, null), (by, other) = by_name[JUDGED], by_name[BY]
    fitted = fit_whole_model(null, other)
    return fitted and fitted.p_value(judged, by)


def _below_the_line(
    level: float,
    other: float,
    subject: ModelInfo | None,
    pairs: Sequence[tuple[CleanModel, CleanModel]],
) -> float:
    """One-sided p-value of a level, for a normal deviation from the line through clean models'.

    The line does not fall: what is fooled by patches more easily is not fooled by pictures less.
    """
    beside = {id(model): by for model, by in pairs}
    models = [model for model, _ in pairs]
    same = alike(models, subject)
    peers = same if len(same) >= _PEERS else models
    y, x = (_tensor(levels) for levels in zip(*_levels(peers, beside), strict=True))
    count, middle = len(x), float(x.mean())
    spread = float(((x - middle) ** 2).sum())
    slope = max(0.0, float(((x - middle) * y).sum()) / spread) if spread > 0 else 0.0
    residuals = y - y.mean() - slope * (x - middle)
    deviation = max(float((residuals**2).sum() / (count - 2)) ** 0.5, _LEAST)
    away = (other - middle) ** 2 / spread if spread > 0 else 0.0
    distance = level - float(y.mean()) - slope * (other - middle)
    t = distance / (deviation * (1 + 1 / count + away) ** 0.5)
    return max(float(stdtr(count - 2, t)), SMALLEST)


def _levels(
    models: Iterable[CleanModel], beside: dict[int, CleanModel]
) -> Iterable[tuple[float, float]]:
    return ((model.level, beside[id(model)].level) for model in models)


def _level(report: ScanReport) -> float | None:
    """The median log score of the labels that were reached; None of fewer than two."""
    scores = [label.score for label in report.labels if label.converged]
    if len(scores) < 2:
        return None
    return float(torch.quantile(log_scores(_tensor(scores)), 0.5))


def _tensor(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
