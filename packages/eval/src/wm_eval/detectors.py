"""Every detector by its short name: how it is scanned with, and where its presets are.

A table and nothing else: no detector is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from defense_nc import ScanReport


@dataclass(frozen=True)
class Detector:
    """A detector, to be imported when it is used.

    Args:
        name: Its short name, in records and on the command line.
        title: Its name in tables.
        where: The module that has ``scan``.
        settings: The module and the class of its settings, as ``module:class``.
        presets: What the common names of presets are called there, where they differ.
        inverts: Whether it reverses one image trigger a label, which can be kept and unlearned.
        perceptual: lambda_3, the weight of LPIPS, where it is not the preset's own.
    """

    name: str
    title: str
    where: str
    settings: str
    presets: Mapping[str, str] = field(default_factory=dict)
    inverts: bool = False
    perceptual: float | None = None

    def config(self, preset: str = "fast", **changes: Any) -> Any:
        """Its settings by the name of a preset, with changes.

        Raises:
            ValueError: No such preset, or a setting outside its range.
        """
        module, _, kind = self.settings.partition(":")
        settings = getattr(import_module(module), kind)
        config = settings.preset(self.presets.get(preset, preset), **changes)
        if self.perceptual is None:
            return config
        return replace(config, lambdas=(*config.lambdas[:2], self.perceptual))

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        preset: str = "fast",
        labels: Tensor | None = None,
        seed: int = 0,
        progress: bool = True,
        config: Any = None,
        alpha: float = 0.05,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> ScanReport:
        """Scan a classifier.

        Args:
            model: Images in [0, 1] to logits ``(N, K)``; given back as it came.
            images: The defender's clean images, float32 ``(N, C, H, W)`` in [0, 1].
            preset: Of the detector's settings; plays no role where ``config`` is given.
            labels: int64 ``(N,)``, the true classes; the model's own answers if None.
            seed: Of the scan.
            progress: Show how far it is.
            config: The detector's settings themselves.
            alpha: Share of clean models that may be called backdoored.
            device: Where to compute; where the model is, if None.
            checkpoint: Where a scan that is stopped leaves what it has, for the next one to go on.

        Raises:
            ValueError: No such preset, or input that the detector refuses.
        """
        run = import_module(self.where).scan
        config = self.config(preset) if config is None else config
        # Not every detector, and not every engine of one, can go on in the middle of a scan.
        goes_on = "checkpoint" in signature(run).parameters
        goes_on = goes_on and getattr(config, "engine", None) != "single"
        more = {"checkpoint": checkpoint} if goes_on else {}
        report: ScanReport = run(
            model,
            images,
            config=config,
            alpha=alpha,
            labels=labels,
            seed=seed,
            progress=progress,
            device=device,
            **more,
        )
        return report


HOUSE = ("nc", "reverse")  # the two that are calibrated; all others are rivals
_REVERSE = ("defense_reverse.scan", "defense_reverse:ReverseConfig")
_SMALL = MappingProxyType({"fast": "small", "robust": "small"})
DETECTORS: Mapping[str, Detector] = MappingProxyType(
    {
        one.name: one
        for one in (
            Detector(
                "nc",
                "Neural Cleanse",
                "defense_nc.scan",
                "defense_nc:NCConfig",
                inverts=True,
            ),
            Detector("reverse", "Reverse generators", *_REVERSE, inverts=True),
            Detector(
                "reverse-lpips",
                "Reverse generators with LPIPS",
                *_REVERSE,
                inverts=True,
                perceptual=0.1,
            ),
            Detector(
                "feature-re",
                "FeatureRE",
                "defense_reverse.detectors.feature_re",
                "defense_reverse.detectors.feature_re:FeatureREConfig",
                _SMALL,
            ),
            Detector(
                "bti-dbf",
                "BTI-DBF",
                "defense_reverse.detectors.bti_dbf",
                "defense_reverse.detectors.bti_dbf:BtiDbfConfig",
                _SMALL,
            ),
        )
    }
)


def detector(name: str) -> Detector:
    """A detector by its short name.

    Raises:
        ValueError: No such detector.
    """
    if name not in DETECTORS:
        raise ValueError(f"expected a detector in {', '.join(DETECTORS)}, got {name!r}")
    return DETECTORS[name]


__all__ = ["DETECTORS", "HOUSE", "Detector", "detector"]
