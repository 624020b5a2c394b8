"""What a mitigation has achieved: accuracy, attack success, and the two in one number."""

from __future__ import annotations

import math
from typing import Any

from wm_eval.intervals import Interval, paired_difference
from wm_eval.measure import metrics_values
from wm_eval.robustness import Outcomes, compare, summarize

_LEVEL = 0.975  # of each of two intervals, so that both hold together with at least 95 %


def der(acc_before: float, asr_before: float, acc_after: float, asr_after: float) -> float:
    """Defence effectiveness rating: what attack success loses, less what accuracy loses.

    Args:
        acc_before: Clean accuracy before, in [0, 1].
        asr_before: Attack success rate before, in [0, 1].
        acc_after: Clean accuracy after, in [0, 1].
        asr_after: Attack success rate after, in [0, 1].

    Returns:
        ``(max(0, asr lost) - max(0, acc lost) + 1) / 2`` in [0, 1]: 0.5 for a defence that does
        nothing, 1 for one that removes a perfect attack at no cost. Neither a rise in accuracy nor
        one in attack success counts.

    Raises:
        ValueError: A rate outside [0, 1].

    Source: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware
        minimization" (2023). A popular benchmark adds the loss of accuracy in one of its two
        functions of this name; the sign here is the definition's.

    Examples:
        >>> der(0.9, 1.0, 0.8, 0.0)
        0.95
    """
    for name, rate in zip(
        ("acc_before", "asr_before", "acc_after", "asr_after"),
        (acc_before, asr_before, acc_after, asr_after),
        strict=True,
    ):
        if not (isinstance(rate, float | int) and math.isfinite(rate) and 0 <= rate <= 1):
            raise ValueError(f"expected {name} in [0, 1], got {rate!r}")
    return _rating(asr_before - asr_after, acc_before - acc_after)


def _rating(asr_lost: float, acc_lost: float) -> float:
    return (max(0.0, asr_lost) - max(0.0, acc_lost) + 1) / 2


def der_interval(before: Outcomes, after: Outcomes) -> Interval:
    """An interval of the rating, from those of the two losses.

    Both losses are measured on the same images before and after; each has its paired interval of
    97.5 %, and the rating's ends are those of the worst and the best corner.

    Args:
        before: Of the victim, image by image.
        after: Of the cleaned model, on the same images.

    Returns:
        The interval; it holds the rating with at least 95 %.

    Raises:
        ValueError: Columns of different lengths, or no image that counts for the attack.
    """
    counted = before.attacked
    asr = compare(before.opened[counted], after.opened[counted])
    acc = compare(before.correct, after.correct)
    asr_lost, acc_lost = (
        paired_difference(d.only_first, d.only_second, d.n, level=_LEVEL) for d in (asr, acc)
    )
    return Interval(_rating(asr_lost.low, acc_lost.high), _rating(asr_lost.high, acc_lost.low))


def mitigation_values(before: Outcomes, after: Outcomes, *, backdoored: bool) -> dict[str, Any]:
    """Both models' rates with their intervals, and the changes, as a record keeps them.

    Args:
        before: Of the victim, image by image.
        after: Of the model afterwards, on the same images.
        backdoored: Whether there is an attack whose success could change; without one its change
            and the rating are None.

    Raises:
        ValueError: Columns of different lengths, or no image that counts for the attack.
    """
    first, second, counted = summarize(before), summarize(after), before.attacked
    values: dict[str, Any] = {
        "before": metrics_values(first),
        "after": metrics_values(second),
        "cda_change": compare(after.correct, before.correct)._asdict(),
        "asr_change": None,
        "der": None,
        "der_interval": None,
    }
    if backdoored:
        values["asr_change"] = compare(after.opened[counted], before.opened[counted])._asdict()
        values["der"] = der(first.cda, first.asr, second.cda, second.asr)
        values["der_interval"] = list(der_interval(before, after))
    return values
