"""Every detector by its short name. Importing this module imports torch: commands do so late."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import defense_reverse.scan
from defense_nc import Detector, NeuralCleanse, ScanReport
from defense_reverse import BtiDbfConfig, FeatureREConfig, ReverseConfig
from defense_reverse.detectors import bti_dbf, feature_re
from wm_inject.core.checks import check_choice


class Entry(NamedTuple):
    """A detector in the table."""

    title: str  # in tables
    preset: Callable[..., Detector]  # a preset's name ("fast" by default) and changes -> detector
    inverts: bool = False  # it reverses one image trigger a label, which can be kept and unlearned
    calibrated: bool = False  # its verdicts rest on scans of clean models


@dataclass(frozen=True)
class _Function:
    """A detector of defense_reverse that is still a function and its settings."""

    name: str
    run: Callable[..., ScanReport]
    config: Any
    alpha: float = 0.05
    max_ratio: float = 0.5

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        return settings

    def scan(self, model: Any, images: Any, *, checkpoint: Any = None, **given: Any) -> ScanReport:
        given = {"checkpoint": checkpoint, "max_ratio": self.max_ratio, **given}
        known = signature(self.run).parameters
        given = {name: value for name, value in given.items() if name in known}
        return self.run(model, images, config=self.config, alpha=self.alpha, **given)


def _preset(
    title: str,
    run: Callable[..., ScanReport],
    settings: Any,
    names: Mapping[str, str],
    perceptual: float | None,
    name: str = "fast",
    *,
    alpha: float = 0.05,
    max_ratio: float = 0.5,
    **changes: Any,
) -> Any:
    config = settings.preset(names.get(name, name), **changes)
    if perceptual is not None:
        config = replace(config, lambdas=(*config.lambdas[:2], perceptual))
    return _Function(title, run, config, alpha, max_ratio)


_REVERSE = (defense_reverse.scan, ReverseConfig, {})
_SMALL = {"fast": "small", "robust": "small"}
DETECTORS: dict[str, Entry] = {
    "nc": Entry("Neural Cleanse", NeuralCleanse.preset, inverts=True, calibrated=True),
    "reverse": Entry(
        "Reverse generators",
        partial(_preset, "reverse-generator", *_REVERSE, None),
        inverts=True,
        calibrated=True,
    ),
    "reverse-lpips": Entry(
        "Reverse generators with LPIPS",
        partial(_preset, "reverse-generator", *_REVERSE, 0.1),
        inverts=True,
    ),
    "feature-re": Entry(
        "FeatureRE",
        partial(_preset, "feature-re", feature_re.scan, FeatureREConfig, _SMALL, None),
    ),
    "bti-dbf": Entry(
        "BTI-DBF", partial(_preset, "bti-dbf", bti_dbf.scan, BtiDbfConfig, _SMALL, None)
    ),
}
CALIBRATED = tuple(name for name, entry in DETECTORS.items() if entry.calibrated)


def detector(name: str, preset: str = "fast", **changes: Any) -> Detector:
    """A detector by its short name, with the settings of a preset and changes.

    Raises:
        ValueError: No such detector or preset, or a setting outside its range.
    """
    check_choice("a detector", name, DETECTORS)
    return DETECTORS[name].preset(preset, **changes)


__all__ = ["CALIBRATED", "DETECTORS", "Entry", "detector"]
