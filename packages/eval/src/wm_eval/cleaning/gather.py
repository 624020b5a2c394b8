"""The records of a cleaning, and their figures as a tidy list of numbers.

Every table is a view of such a list, and its CSV is the list itself.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from wm_eval.attacks.config import CLEAN, TABLE
from wm_eval.attacks.gather import Failure, read_failures
from wm_eval.attacks.spread import Spread
from wm_eval.cleaning.config import TITLES
from wm_eval.records import Record, read_records

# What a record must have before a table can be made of it.
_CLEANED = ("attack", "method", "share", "forced", "cleaned", "images", "steps", "before", "after")
_NEEDED = {
    "cleaning": ("name", "n_train", "n_measured", "planned"),
    "clean": (*_CLEANED, "acc_change", "asr_change", "der", "der_interval", "labels", "why"),
    "scan": ("attack", "defence", "verdict", "named", "forced_label"),
    "rescan": ("attack", "method", "share", "verdict", "verdict_before", "named", "agrees"),
}
_NEEDED["forced"] = _NEEDED["clean"]


class Figure(NamedTuple):
    """One figure of a table. Rates are fractions, whatever the table prints."""

    attack: str
    method: str
    forced: bool  # the true target's trigger, which the scan had not named
    share: float  # of the training images, clean
    measure: str  # "acc", "asr", "der" after it, "acc-before", "asr-before"
    source: str  # "measured" or "paper"
    seed: int | None  # None for the paper, which does not say
    value: float


class Cleaned(NamedTuple):
    """The record of one cleaning, and its seed."""

    seed: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CleaningRecords:
    """What one folder holds; ``planned`` says what was asked for."""

    about: Mapping[str, Any]
    cleanings: Sequence[Cleaned]
    scans: Sequence[Cleaned]
    rescans: Sequence[Cleaned]
    failures: Sequence[Failure]

    @property
    def planned(self) -> Mapping[str, Sequence[Any]]:
        """Attacks, methods, shares and seeds that were asked for."""
        return dict(self.about["planned"])

    @property
    def attacks(self) -> list[str]:
        """The attacks there are or should be, in the order of the tables; no clean victim."""
        found = {c.values["attack"] for c in self.cleanings} | set(self.planned["attacks"])
        return [name for name in TABLE if name in found]

    @property
    def methods(self) -> list[str]:
        """The methods there are or should be, in the order of the tables."""
        found = {c.values["method"] for c in self.cleanings} | set(self.planned["methods"])
        return [name for name in TITLES if name in found]

    @property
    def shares(self) -> list[float]:
        """The shares of clean data there are or should be, rising."""
        found = {c.values["share"] for c in self.cleanings} | set(self.planned["shares"])
        return sorted(found)

    def of(
        self, attack: str, method: str, *, share: float | None = None, forced: bool = False
    ) -> list[Cleaned]:
        """The cleanings of a row, of one share or of all."""
        wanted = (attack, method, forced)
        return [
            c
            for c in self.cleanings
            if (c.values["attack"], c.values["method"], c.values["forced"]) == wanted
            and share in (None, c.values["share"])
        ]

    def why(self, stage: str, attack: str, seed: int) -> str:
        """Why a cleaning has no record: what it, or what it needs, left behind."""
        mine = {f.stage: f.reason for f in self.failures if (f.attack, f.seed) == (attack, seed)}
        return mine.get(stage, "not run")


def read_cleaning(out: str | Path) -> CleaningRecords:
    """Read the folder of a cleaning: ``records/``, and ``failures/`` if there is one.

    Raises:
        ValueError: No records, none of a cleaning, of more than one data set, or one that is not
            what its name says.
    """
    out = Path(out)
    records = read_records(out / "records")
    if "cleaning" not in records:
        raise ValueError(f"expected the record cleaning.json in {out / 'records'}, found none")
    found: dict[str, list[Cleaned]] = {kind: [] for kind in _NEEDED}
    used = []
    for name, record in records.items():
        kind = name.partition("-")[0]
        if kind in found:
            _check(name, kind, record)
            found[kind].append(Cleaned(record.seed, record.values))
            used.append(record)
    if len({record.data for record in used}) > 1:
        raise ValueError("expected the records of one data set, got more")
    return CleaningRecords(
        about=records["cleaning"].values,
        cleanings=sorted([*found["clean"], *found["forced"]], key=lambda c: c.seed),
        scans=sorted(found["scan"], key=lambda c: c.seed),
        rescans=sorted(found["rescan"], key=lambda c: c.seed),
        failures=read_failures(out / "failures"),
    )


def figures(study: CleaningRecords) -> tuple[Figure, ...]:
    """Every cleaning's figures, in the order of the tables."""
    numbers = []
    for attack in (CLEAN, *study.attacks):
        for method in study.methods:
            for forced in (False, True):
                for cleaned in study.of(attack, method, forced=forced):
                    share = cleaned.values["share"]
                    row = (attack, method, forced, share)
                    numbers += [
                        Figure(*row, measure, "measured", cleaned.seed, value)
                        for measure, value in _measures(cleaned.values).items()
                        if value is not None
                    ]
    return tuple(numbers)


def _measures(values: Mapping[str, Any]) -> dict[str, float | None]:
    attacked = values["asr_change"] is not None
    return {
        "acc-before": values["before"]["cda"],
        "acc": values["after"]["cda"],
        "asr-before": values["before"]["asr"] if attacked else None,
        "asr": values["after"]["asr"] if attacked else None,
        "der": values["der"],
    }


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    found = list(values)
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else None, len(found))


def tidy_csv(name: str, data: str, numbers: Iterable[Figure]) -> str:
    """Figures as CSV, one a row and none rounded; rates are fractions."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("table", "data", *Figure._fields))
    for number in numbers:
        *names, seed, value = number
        writer.writerow((name, data, *names, "" if seed is None else seed, repr(value)))
    return buffer.getvalue()


def about(study: CleaningRecords) -> str:
    """What everything was measured on, in a few plain sentences."""
    told, seeds = study.about, study.planned["seeds"]
    many = ", ".join(map(str, seeds))
    said = [
        f"{told['name']}, {told.get('model', 'a classifier')}: {told['n_train']} training images, "
        f"rates over {told['n_measured']} test images.",
        f"Profile {told['profile']}." if "profile" in told else "",
        f"Seed {many}: one, so there is no spread."
        if len(seeds) == 1
        else f"Seeds {many}: mean ± sample standard deviation.",
    ]
    return " ".join(part for part in said if part)


def _check(name: str, kind: str, record: Record) -> None:
    missing = [key for key in _NEEDED[kind] if key not in record.values]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in the record {name}, found none")


__all__ = [
    "Cleaned",
    "CleaningRecords",
    "Figure",
    "about",
    "figures",
    "read_cleaning",
    "spread",
    "tidy_csv",
]
