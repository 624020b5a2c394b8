"""Removal and forgery of a mark by averaging: what every marked image gives away of it.

The attack is that of Yang et al., "Can Simple Averaging Defeat Modern Watermarks?" (NeurIPS 2024):
the mean of marked images less the mean of clean ones is taken off marked images, or added to clean
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from wm_extract.detect import MarkDetector
from wm_inject import check_images, quantize


class Averaged(NamedTuple):
    """What the detector says after the attack, as shares of the images attacked."""

    known: int  # marked images that were averaged, and as many clean ones
    found: float  # marked images still found after the estimate was taken off
    forged: float  # clean images taken for marked after it was added


def attack_by_averaging(
    detector: MarkDetector,
    marked: Tensor,
    clean: Tensor,
    *,
    seen_marked: Tensor,
    seen_clean: Tensor,
    counts: Sequence[int],
) -> tuple[Averaged, ...]:
    """Average the first ``count`` of the seen images, for every count, and attack with that.

    Args:
        detector: Judges the attacked images, which are rounded to 8 bits before.
        marked: Marked images ``(N, C, H, W)``, not among those seen.
        clean: Clean ones, not among those seen.
        seen_marked: Marked images that the attacker has.
        seen_clean: Clean images that the attacker has: the originals of ``seen_marked`` (the
            attacker knows pairs), or others.
        counts: How many of the seen ones are averaged, each at least 1.

    Raises:
        ValueError: Images of different shapes, or a count beyond the images seen.
    """
    groups = {"marked": marked, "clean": clean}
    groups |= {"seen_marked": seen_marked, "seen_clean": seen_clean}
    for name, images in groups.items():
        if check_images(images, name=name).shape[1:] != marked.shape[1:]:
            got = f"{tuple(marked.shape[1:])} and {tuple(images.shape[1:])}"
            raise ValueError(f"expected {name} of the marked images' shape, got {got}")
    most = min(len(seen_marked), len(seen_clean))
    if not counts or not all(1 <= count <= most for count in counts):
        raise ValueError(f"expected counts in 1 .. {most}, got {tuple(counts)}")
    rows = []
    for count in counts:
        estimate = seen_marked[:count].mean(0) - seen_clean[:count].mean(0)
        rows.append(
            Averaged(count, _found(detector, marked - estimate), _found(detector, clean + estimate))
        )
    return tuple(rows)


def _found(detector: MarkDetector, images: Tensor) -> float:
    return float(detector.detect(quantize(images)).marked.float().mean())
