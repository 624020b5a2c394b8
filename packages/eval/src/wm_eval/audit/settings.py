"""The settings of ``wm-eval scan`` and ``clean``: what --config reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanSettings:
    """How ``wm-eval scan`` looks at a model.

    Args:
        count: Clean images to use.
        detectors: Names out of `wm_eval.detectors.DETECTORS`.
        preset: Of the detectors.
        alpha: Share of clean models that may be accused, in (0, 1).
        seed: Of every draw.
    """

    count: int = 500
    detectors: tuple[str, ...] = ("nc", "reverse")
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class CleanSettings:
    """How ``wm-eval clean`` looks at a model and cleans it: as `ScanSettings`, and how often.

    Args:
        rounds: Unlearn and scan again so often at most.
        count: Clean images to use.
        detectors: Names out of `wm_eval.detectors.DETECTORS`.
        preset: Of the detectors.
        alpha: Share of clean models that may be accused, in (0, 1).
        seed: Of every draw.
    """

    rounds: int = 3
    count: int = 500
    detectors: tuple[str, ...] = ("nc", "reverse")
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0


__all__ = ["CleanSettings", "ScanSettings"]
