"""Figures over seeds: mean and spread, as numbers and as the text of a cell."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import NamedTuple

from wm_eval.attacks.gather import Number
from wm_eval.tables import ABSENT


class Spread(NamedTuple):
    """Mean over seeds, sample standard deviation (None for one seed), and how many seeds."""

    mean: float
    sd: float | None
    n: int


def over_seeds(numbers: Iterable[Number], attack: str, measure: str, column: str) -> Spread | None:
    """Mean and sample standard deviation of an entry's measured values; None if there are none."""
    entry = (attack, measure, column, "measured")
    values = [n.value for n in numbers if (n.attack, n.measure, n.column, n.source) == entry]
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def plus_minus(
    spread: Spread | None, *, factor: float = 1, digits: int = 2, sign: bool = False
) -> str:
    """A mean with its spread: "91.5 ± 0.3", without a spread for one seed; None a dash."""
    if spread is None:
        return ABSENT
    plus = "+" if sign else ""
    text = f"{factor * spread.mean:{plus}.{digits}f}"
    return text if spread.sd is None else f"{text} ± {factor * spread.sd:.{digits}f}"


def counted(counts: Iterable[int]) -> str:
    """Counts that may differ from row to row: "3", or "2 to 3"; none a dash."""
    found = sorted(set(counts))
    if not found:
        return ABSENT
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


__all__ = ["Spread", "counted", "over_seeds", "plus_minus"]
