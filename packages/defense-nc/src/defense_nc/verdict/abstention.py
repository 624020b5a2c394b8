"""Reasons to abstain, each one sentence for the report, or None.

Triggers bound to an image's own class (that work on one class only, or send class y to y + 1) are
no such reason: a scan that reverses one trigger per label for the images of all other classes
together cannot see them. The reason of its clean verdict says so, where scores are of no one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

import torch
from torch import Tensor

from defense_nc.verdict.calibration import Calibration, CleanModel
from defense_nc.verdict.model_info import ModelInfo

MIN_CONVERGED = 4  # of many labels; without a calibration no score of fewer is an outlier
STARVED = 0.5  # a label's search led by the minority of its images is none
NOT_LOOKED_FOR = "Triggers bound to an image's own class were not looked for"
_SLACK = 2.0  # the number of images may differ by this factor: scores change little with it
_WIDER = 1.5  # a spread above this times the widest of the clean models is not a clean one


def needed(count: int) -> int:
    """How many of ``count`` labels must converge: a target may be among those that did not."""
    return min(count, max(MIN_CONVERGED, (count + 1) // 2))


def few_classes(count: int) -> str | None:
    """So few labels say nothing of their own spread, and no calibration does."""
    if count >= MIN_CONVERGED:
        return None
    return (
        f"Among {count} classes no score can be called unusual without a calibration: it takes "
        f"{MIN_CONVERGED}."
    )


def too_few(reached: Tensor, floor: float) -> str | None:
    """Too few labels were reached."""
    count, converged = len(reached), int(reached.sum())
    if converged >= needed(count):
        return None
    return (
        f"Only {converged} of {count} labels reached a success rate of {floor:g}, "
        f"and a comparison needs {needed(count)}."
    )


def too_many(suspected: Sequence[int], compared: int) -> str | None:
    """More than a third of the labels stand out: the others give no reference.

    One of two or three may: the spread of clean models is known.
    """
    if len(suspected) <= max(1, compared // 3):
        return None
    return (
        f"Too many labels stand out ({len(suspected)} of {compared}): "
        "several backdoors, or one that has many targets."
    )


def starved_search(starved: Sequence[float], suspected: Sequence[int]) -> str | None:
    """Searches had no gradients to follow: their scores are not those of the model.

    Those of most labels, or that of one while no label is suspected. A label that is reached in the
    end has still been searched in the dark, and may be nearer than it looks.
    """
    labels = [label for label, share in enumerate(starved) if share > STARVED]
    if not labels or (suspected and 2 * len(labels) <= len(starved)):
        return None
    numbers = ", ".join(map(str, labels[:6])) + (" and others" if len(labels) > 6 else "")
    return (
        f"The search for label {numbers} had no gradients to follow (up to "
        f"{max(starved[k] for k in labels):.0%} of its images): they vanish behind outputs that "
        "are rounded or saturate, or are masked."
    )


def out_of_domain(subject: ModelInfo | None, calibration: Calibration) -> str | None:
    """The model differs from all clean models that the verdict rule was calibrated on."""
    if subject is None:
        return None
    known = [model.subject for model in calibration.models]
    differences = [
        _outside("classes", subject.classes, [s.classes for s in known]),
        _outside("pixels a side", subject.image_size, [s.image_size for s in known]),
        _outside("clean images to scan with", subject.images, [s.images for s in known], _SLACK),
    ]
    channels = sorted({s.channels for s in known})
    if subject.channels not in channels:
        allowed = " or ".join(map(str, channels))
        differences.append(f"images of {allowed} channels; these have {subject.channels}")
    networks = sorted({s.network for s in known})
    if subject.network not in networks:
        kind = {"other": "neither convolutional nor a transformer"}.get(subject.network)
        differences.append(
            f"{' and '.join(networks)} networks; this one is {kind or subject.network}"
        )
    first = next((text for text in differences if text), None)
    return first and f"The verdict rule is calibrated for {first}."


def scores_shifted(logs: Tensor, peers: Sequence[CleanModel]) -> str | None:
    """No label stands out, and yet no clean model had such scores: all are low, or wide apart.

    A backdoor with a trigger for every label makes all of them easy, so that none stands out; one
    with a trigger for half of them leaves two groups. Not checked where a label does stand out:
    triggers that are cheap to reverse make all labels easy, and a third of the right detections
    would be lost (docs/audit.md).
    """
    levels = [model.level for model in peers]
    level, lowest = float(torch.quantile(logs, 0.5)), min(levels)
    # One deviation below the lowest: a clean model that is a little easier is no reason to doubt.
    if level < lowest - stdev(levels):
        share = float(torch.tensor(level - lowest).exp())
        return (
            f"Every label is easy to reach: the median score is {share:.2f} of the lowest of "
            f"{len(peers)} clean models, as a backdoor with a trigger for each would make it."
        )
    spread, widest = float(logs.std()), max(model.deviation for model in peers)
    if spread > _WIDER * widest:
        return (
            f"The labels' log scores lie {spread:.2f} apart (standard deviation), and those of "
            f"{len(peers)} clean models at most {widest:.2f}: they may fall into two groups."
        )
    return None


def _outside(what: str, value: int, known: list[int], slack: float = 1.0) -> str | None:
    low, high = min(known), max(known)
    if low / slack <= value <= high * slack:
        return None
    span = f"{low}" if low == high else f"{low} to {high}"
    return f"{span} {what}; here there are {value}"
