"""Every detector by its short name (titles: `wm_eval.titles`).

Importing this module imports torch: commands do so late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from defense_nc import Detector, NeuralCleanse
from defense_nc.verdict import LabelScore
from defense_reverse import (
    BtiDbf,
    FeatureRE,
    HeadWeights,
    MarginAscent,
    PatchSweep,
    ReverseGenerator,
    UniversalPerturbation,
)
from wm_inject.core.checks import check_choice


class Entry(NamedTuple):
    """A detector in the table."""

    preset: Callable[..., Detector]  # a preset's name ("fast" by default) and changes -> detector
    # Images through the model and back at most, from the settings and the number of labels.
    passes: Callable[[Mapping[str, Any], int], float]
    inverts: bool = False  # it reverses one image trigger a label, which can be kept and unlearned
    # What a label's score and rate mean, for people: the end of a sentence about the label.
    meaning: Callable[[LabelScore], str] = lambda label: (
        f"score {label.score:.3g}, reached with {label.success_rate:.0%} of the images"
    )


def _with_lpips(preset: str = "fast", **changes: Any) -> ReverseGenerator:
    """Reverse generators with the paper's weight of LPIPS in the reconstruction loss."""
    detector = ReverseGenerator.preset(preset, **changes)
    lambdas = (*detector.config.lambdas[:2], 0.1)
    return replace(detector, config=replace(detector.config, lambdas=lambdas))


def _batches(settings: Mapping[str, Any], labels: int) -> float:
    return float(settings["steps"] * settings["batch_size"] * labels)


DETECTORS: dict[str, Entry] = {
    "nc": Entry(
        NeuralCleanse.preset,
        lambda s, labels: _batches(s, labels) * s["batches"] * len(s["starts"]),
        inverts=True,
        meaning=lambda label: (
            f"{label.score:.1f} pixels replaced send {label.success_rate:.0%} of the images there"
        ),
    ),
    "reverse": Entry(ReverseGenerator.preset, _batches, inverts=True),
    "reverse-lpips": Entry(_with_lpips, _batches, inverts=True),
    "feature-re": Entry(
        FeatureRE.preset,
        lambda s, labels: float((s["warmup_steps"] + s["steps"]) * s["batch_size"] * labels),
    ),
    "bti-dbf": Entry(BtiDbf.preset, lambda s, labels: _batches(s, 1)),  # one search for all
    # The images that success is measured on go forwards only, a dozen times.
    "uap": Entry(
        UniversalPerturbation.preset,
        lambda s, labels: _batches(s, labels) + 4 * s["tested"] * labels,
        inverts=True,
        meaning=lambda label: (
            f"an added picture of {255 * label.score:.1f}/255 (root mean square) sends "
            f"{label.success_rate:.0%} of unseen images there"
        ),
    ),
    # Forwards only, which is a third; four pictures at every place.
    "sweep": Entry(
        PatchSweep.preset,
        lambda s, labels: (
            (
                4 * s["places"] ** 2 * len(s["sides"]) * s["searched"]
                + min(labels, s["candidates"]) * s["tested"]
            )
            / 3
        ),
        meaning=lambda label: f"its best square sends {label.success_rate:.0%} of the images there",
    ),
    "head": Entry(
        HeadWeights.preset,
        lambda s, labels: float(s["most"] * labels),
        meaning=lambda label: (
            f"its row of the last layer holds {1 / label.score:.2f} times as much that its own "
            "images do not explain as the middle one"
        ),
    ),
    "mm-bd": Entry(MarginAscent.preset, lambda s, labels: float(s["steps"] * s["starts"] * labels)),
}


def detector(name: str, preset: str = "fast", **changes: Any) -> Detector:
    """A detector by its short name, with the settings of a preset and changes.

    Raises:
        ValueError: No such detector or preset, or a setting outside its range.
    """
    check_choice("a detector", name, DETECTORS)
    return DETECTORS[name].preset(preset, **changes)
