"""Every detector by its short name (titles: `wm_eval.titles`).

Importing this module imports torch: commands do so late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from defense_nc import Detector, NeuralCleanse
from defense_nc.verdict import LabelScore
from defense_reverse import (
    BtiDbf,
    FeatureRE,
    HeadWeights,
    MarginAscent,
    PairPerturbation,
    PatchSweep,
    ReverseGenerator,
    UniversalPerturbation,
    UniversalWarp,
)
from defense_reverse.detectors.head_weights import refusal
from defense_reverse.detectors.pair_perturbation import too_few_classes
from wm_inject.core.checks import check_choice
from wm_victim import predict


class Entry(NamedTuple):
    """A detector in the table."""

    preset: Callable[..., Detector]  # a preset's name ("fast" by default) and changes -> detector
    # Images through the model and back at most, from the settings and the number of labels and of
    # clean images.
    passes: Callable[[Mapping[str, Any], int, int], float]
    # Why it cannot look at a model, from the model, images and their labels, or None.
    refusal: Callable[[nn.Module, Tensor, Tensor | None], str | None] = lambda *_: None
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


def _batches(settings: Mapping[str, Any], labels: int, images: int) -> float:
    return float(settings["steps"] * settings["batch_size"] * labels)


DETECTORS: dict[str, Entry] = {
    "nc": Entry(
        NeuralCleanse.preset,
        lambda s, *counts: _batches(s, *counts) * s["batches"] * len(s["starts"]),
        inverts=True,
        meaning=lambda label: (
            f"{label.score:.1f} pixels replaced send {label.success_rate:.0%} of the images there"
        ),
    ),
    "reverse": Entry(ReverseGenerator.preset, _batches, inverts=True),
    "reverse-lpips": Entry(_with_lpips, _batches, inverts=True),
    "feature-re": Entry(
        FeatureRE.preset,
        lambda s, labels, images: float(
            (s["warmup_steps"] + s["steps"]) * s["batch_size"] * labels
        ),
    ),
    # One search for all labels.
    "bti-dbf": Entry(BtiDbf.preset, lambda s, labels, images: _batches(s, 1, images)),
    # The images that success is measured on go forwards only, a dozen times.
    "uap": Entry(
        UniversalPerturbation.preset,
        lambda s, labels, images: _batches(s, labels, images) + 4 * s["tested"] * labels,
        inverts=True,
        meaning=lambda label: (
            f"an added picture of {255 * label.score:.1f}/255 (root mean square) sends "
            f"{label.success_rate:.0%} of unseen images there"
        ),
    ),
    # Forwards only, which is a third; four pictures at every place.
    "sweep": Entry(
        PatchSweep.preset,
        lambda s, labels, images: (
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
        lambda s, labels, images: (images + min(images, s["most"] * labels)) / 3,
        refusal=refusal,
        meaning=lambda label: (
            f"its own images leave {1 / label.score:.2f} times as much of its weights unexplained "
            "as the middle label's"
        ),
    ),
    # Every image of a step stands for one pair; the map is a search for one label more.
    "pairs": Entry(
        PairPerturbation.preset,
        lambda s, labels, images: (
            _batches(s, labels * (labels - 1), images)
            + 4 * s["tested"] * labels * (labels - 1)
            + (s["rounds"] * s["steps"] + s["map_steps"]) * s["map_batch_size"]
        ),
        refusal=lambda model, images, labels: too_few_classes(
            predict(model, images).argmax(1) if labels is None else labels
        ),
        inverts=True,
        meaning=lambda label: (
            f"{1 / label.score:.1f} times as near to class {label.source} as the classes let expect"
        ),
    ),
    "warp": Entry(
        UniversalWarp.preset,
        lambda s, labels, images: _batches(s, labels, images) + s["tested"] * labels / 3,
        inverts=True,
        meaning=lambda label: f"small shifts send {label.success_rate:.0%} of the images there",
    ),
    "mm-bd": Entry(
        MarginAscent.preset,
        lambda s, labels, images: float(s["steps"] * s["starts"] * labels),
    ),
}


def detector(name: str, preset: str = "fast", **changes: Any) -> Detector:
    """A detector by its short name, with the settings of a preset and changes.

    Raises:
        ValueError: No such detector or preset, or a setting outside its range.
    """
    check_choice("a detector", name, DETECTORS)
    return DETECTORS[name].preset(preset, **changes)
