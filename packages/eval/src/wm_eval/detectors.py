"""Every detector by its short name (titles: `wm_eval.titles`).

Importing this module imports torch: commands do so late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from defense_nc import Detector, NeuralCleanse
from defense_reverse import BtiDbf, FeatureRE, MarginAscent, ReverseGenerator
from wm_inject.core.checks import check_choice


class Entry(NamedTuple):
    """A detector in the table."""

    preset: Callable[..., Detector]  # a preset's name ("fast" by default) and changes -> detector
    inverts: bool = False  # it reverses one image trigger a label, which can be kept and unlearned


def _with_lpips(preset: str = "fast", **changes: Any) -> ReverseGenerator:
    """Reverse generators with the paper's weight of LPIPS in the reconstruction loss."""
    detector = ReverseGenerator.preset(preset, **changes)
    lambdas = (*detector.config.lambdas[:2], 0.1)
    return replace(detector, config=replace(detector.config, lambdas=lambdas))


DETECTORS: dict[str, Entry] = {
    "nc": Entry(NeuralCleanse.preset, inverts=True),
    "reverse": Entry(ReverseGenerator.preset, inverts=True),
    "reverse-lpips": Entry(_with_lpips, inverts=True),
    "feature-re": Entry(FeatureRE.preset),
    "bti-dbf": Entry(BtiDbf.preset),
    "mm-bd": Entry(MarginAscent.preset),
}


def detector(name: str, preset: str = "fast", **changes: Any) -> Detector:
    """A detector by its short name, with the settings of a preset and changes.

    Raises:
        ValueError: No such detector or preset, or a setting outside its range.
    """
    check_choice("a detector", name, DETECTORS)
    return DETECTORS[name].preset(preset, **changes)
