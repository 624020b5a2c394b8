"""Settings of ``wm-eval scan``, ``clean`` and ``filter``, checked without importing torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from defense_nc.config import PRESETS as NC_PRESETS
from defense_nc.config import check_rule
from defense_reverse.config import PRESETS as REVERSE_PRESETS
from wm_eval.titles import AUDIT, DETECTORS
from wm_inject.core.checks import check_choice

if TYPE_CHECKING:
    from defense_nc import LayerRanks, ParameterScaling

AUTO = ("auto",)  # in place of detectors: the cheap ones that are calibrated for the model
MIN_IMAGES = 20  # fewer say nothing of ten classes
FILTERS = ("layer-ranks", "parameter-scaling")  # those that need no scan, and become a file
_PRESETS: dict[str, Collection[str]] = {
    "nc": NC_PRESETS,
    "reverse": REVERSE_PRESETS,
    "reverse-lpips": REVERSE_PRESETS,
}


@dataclass(frozen=True)
class ScanSettings:
    """Settings of ``wm-eval scan``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    count: int = 500
    detectors: tuple[str, ...] = AUTO
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class CleanSettings:
    """Settings of ``wm-eval clean``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    rounds: int = 3
    max_loss: float = 0.05
    count: int = 500
    detectors: tuple[str, ...] = AUTO
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.rounds < 1:
            raise ValueError(f"expected rounds >= 1, got {self.rounds}")
        if not 0 < self.max_loss <= 1:
            raise ValueError(f"expected max_loss in (0, 1], got {self.max_loss}")


@dataclass(frozen=True)
class FilterSettings:
    """Settings of ``wm-eval filter``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    method: str = "layer-ranks"
    rate: float = 0.01
    count: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("a method", self.method, FILTERS)
        if not 0 < self.rate < 1:
            raise ValueError(f"expected a rate in (0, 1), got {self.rate}")
        _check_count(self.count)

    def build(self) -> LayerRanks | ParameterScaling:
        """The filter."""
        from defense_nc import LayerRanks, ParameterScaling

        kind = LayerRanks if self.method == LayerRanks.name else ParameterScaling
        return kind(false_positive_rate=self.rate)


def _check(settings: ScanSettings | CleanSettings) -> None:
    check_detectors(settings.detectors, settings.preset, settings.alpha)
    _check_count(settings.count)


def _check_count(count: int) -> None:
    if count < MIN_IMAGES:
        raise ValueError(f"expected a count of at least {MIN_IMAGES}, got {count}")


def check_detectors(names: Sequence[str], preset: str, alpha: float) -> None:
    """Raise ``ValueError`` unless detectors, the preset of all of them and alpha can be used."""
    if tuple(names) == AUTO:
        names = AUDIT
    if not names or len(set(names)) < len(names) or not set(names) <= set(DETECTORS):
        choices, listing = ", ".join(DETECTORS), ", ".join(names) or "none"
        raise ValueError(f"expected detectors out of {choices} (or auto), each once, got {listing}")
    check_rule(alpha)
    for name in names:
        # Those of the others stand in modules that import torch; all have these two.
        check_choice(f"a preset of {name}", preset, _PRESETS.get(name, ("paper", "fast")))
