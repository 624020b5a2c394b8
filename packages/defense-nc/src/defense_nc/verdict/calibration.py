"""The null distribution of one detector's scores, and the clean models that it was fitted to.

Shipped in ``calibration.json``; `fit_calibration` gives the same numbers from the same scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense_nc.verdict.model_info import ModelInfo
from defense_nc.verdict.shrinkage import Prior, Spread, moderated_p_values, prior_of, spread_of
from defense_nc.verdict.tail_fit import Tail, tail_p_values
from wm_inject.core.files import write_text

_FILE = "calibration.json"
_DIGITS = 9  # of a setting that must agree
_PEERS = 5  # with fewer clean models of the same shape, all are used


@dataclass(frozen=True)
class CleanModel:
    """One clean model of a calibration, and its log scores."""

    log_scores: tuple[float, ...]  # natural logarithms, of the labels that were reached, >= 2
    subject: ModelInfo
    dataset: str  # for the record, as the next one
    arch: str
    name: str = ""  # of the model: the same in the calibrations of all detectors that scanned it
    labels: tuple[int, ...] | None = None  # whose scores they are; None if that is not known
    idle: tuple[int, ...] = ()  # the labels among them whose trigger does not work

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        numbers, count = set(self.labels), len(self.log_scores)
        if len(self.labels) != count or not numbers <= set(range(self.subject.classes)):
            raise ValueError(f"expected a label of the model for each of {count} log scores")
        if len(numbers) < count or not set(self.idle) <= numbers:
            raise ValueError("expected every label once, and idle ones among them")

    # A model is judged beside hundreds of others, and they beside it: each number once.
    @cached_property
    def level(self) -> float:
        """The median log score."""
        return float(torch.quantile(self._logs, 0.5))

    @cached_property
    def deviation(self) -> float:
        """The ordinary standard deviation of the log scores."""
        return float(self._logs.std())

    @cached_property
    def spread(self) -> Spread:
        """The spread of the log scores that outliers do not widen."""
        return spread_of(self._logs)

    @property
    def _logs(self) -> Tensor:
        return torch.tensor(self.log_scores).double()


@dataclass(frozen=True)
class Calibration:
    """The null distribution of one detector with one preset, and the clean models behind it."""

    detector: str
    preset: str
    sigma0: float  # typical deviation of log scores within a clean model, > 0
    nu0: float  # its weight, in degrees of freedom, > 0
    tail: Tail
    models: tuple[CleanModel, ...]  # at least five
    settings: Mapping[str, Any]  # ready for JSON: other settings need another calibration
    versions: Mapping[str, str]  # of the packages that made the scores

    def __post_init__(self) -> None:
        for name in ("sigma0", "nu0"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        share, threshold, exponent, peaks = self.tail
        if not (0 < share < 1 and 0 < threshold < 1 and 0 < exponent <= 1 and peaks >= 1):
            raise ValueError(
                "expected a tail with share and threshold in (0, 1), exponent in (0, 1] and "
                f"peaks >= 1, got {tuple(self.tail)}"
            )
        if len(self.models) < 5:
            raise ValueError(f"expected at least 5 clean models, got {len(self.models)}")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any number in it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prior(self, subject: ModelInfo | None) -> Prior:
        """The spread of the `peers`."""
        peers = self.peers(subject)
        if len(peers) == len(self.models):
            return Prior(self.sigma0, self.nu0)
        return prior_of([model.spread for model in peers])

    def covers(self, classes: int) -> bool:
        """Whether that many classes lie between those of the clean models."""
        known = [model.subject.classes for model in self.models]
        return min(known) <= classes <= max(known)

    def p_values(self, logs: Tensor, subject: ModelInfo | None = None) -> Tensor:
        """Calibrated p-values ``(K,)`` of a scan's log scores ``(K,)``, K >= 2.

        Each is the probability that any of K clean labels is this low (Sidak's correction), so that
        the smallest is the model's. The spread is that of the `peers` of ``subject``.
        """
        return any_of(self.label_p_values(logs, self.prior(subject)))

    def label_p_values(self, logs: Tensor, prior: Prior) -> Tensor:
        """As `p_values`, of each label for itself, with a spread such as `prior` gives."""
        return tail_p_values(moderated_p_values(logs, prior), self.tail)

    def peers(self, subject: ModelInfo | None) -> tuple[CleanModel, ...]:
        """The clean models of the same classes and image shape if there are five, or else all."""
        return alike(self.models, subject)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        # Through JSON, so that tuples are lists as they are when read again.
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Read what `to_dict` wrote; ``ValueError`` for anything else."""
        try:
            models = tuple(
                CleanModel(
                    **{
                        **model,
                        "log_scores": tuple(model["log_scores"]),
                        "subject": ModelInfo(**model["subject"]),
                        "labels": _labels(model.get("labels")),
                        "idle": tuple(model.get("idle", ())),
                    }
                )
                for model in values["models"]
            )
            return cls(**{**values, "models": models, "tail": Tail(*values["tail"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected the fields of a calibration, got {error}") from None


def any_of(single: Tensor) -> Tensor:
    """For p-values ``(K,)`` of single labels: the probability that any of K is as small."""
    return -torch.expm1(len(single) * torch.log1p(-single))


def alike(models: Sequence[CleanModel], subject: ModelInfo | None) -> tuple[CleanModel, ...]:
    """Those of as many classes, such images and such a network if there are five, or else all."""
    if subject is None:
        return tuple(models)

    def shape(info: ModelInfo) -> tuple[int, int, int, str]:
        return info.classes, info.image_size, info.channels, info.network

    same = tuple(model for model in models if shape(model.subject) == shape(subject))
    return same if len(same) >= _PEERS else tuple(models)


def load_calibration(
    detector: str,
    preset: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    classes: int | None = None,
) -> Calibration | None:
    """The calibration shipped for a detector; arguments and result as for `find_calibration`."""
    return find_calibration(_shipped(), detector, preset=preset, settings=settings, classes=classes)


def find_calibration(
    calibrations: Iterable[Calibration],
    detector: str,
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: int | None = None,
) -> Calibration | None:
    """The calibration of a detector with these settings; None if there is none.

    Numbers of classes may have calibrations of their own. Without one for ``classes`` the first is
    returned, and judging with it abstains. None for the other arguments means any.
    """
    required = None if settings is None else _comparable(settings)
    fitting = [
        calibration
        for calibration in calibrations
        if calibration.detector == detector
        and preset in (None, calibration.preset)
        and required in (None, _comparable(calibration.settings))
    ]
    covering = (c for c in fitting if classes is not None and c.covers(classes))
    return next(covering, fitting[0] if fitting else None)


def read_calibrations(path: Path) -> tuple[Calibration, ...]:
    """The calibrations in a JSON file."""
    return _parse(path.read_text(encoding="utf-8"))


def write_calibrations(path: Path, calibrations: Iterable[Calibration]) -> None:
    """Write calibrations as JSON, one line per clean model, so that changes can be read."""
    entries = []
    for calibration in calibrations:
        values = calibration.to_dict()
        models = ",\n  ".join(json.dumps(model) for model in values.pop("models"))
        entries.append(f'{json.dumps(values)[:-1]}, "models": [\n  {models}\n]}}')
    write_text(path, "[" + ",\n".join(entries) + "]\n")


@lru_cache(maxsize=1)
def _shipped() -> tuple[Calibration, ...]:
    return _parse(resources.files("defense_nc").joinpath(_FILE).read_text(encoding="utf-8"))


def _comparable(settings: Mapping[str, Any]) -> Any:
    """Settings as JSON gives them; numbers to the digits that records keep."""
    return json.loads(
        json.dumps(dict(settings)), parse_float=lambda text: float(f"{float(text):.{_DIGITS}g}")
    )


def _labels(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _parse(text: str) -> tuple[Calibration, ...]:
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("expected a JSON list of calibrations")
    return tuple(Calibration.from_dict(entry) for entry in entries)
