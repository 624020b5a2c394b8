"""The records of an attack study, sorted by run, and their figures as a tidy list of numbers.

Every table of the study is a view of such a list, and its CSV is the list itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.attacks.paper import PAPER_TABLE2
from wm_eval.records import Record, read_records
from wm_inject.attacks import ATTACKS, list_attacks

# In the order of the paper's table; then what it does not have, and what the attacks stand against.
TITLES = {
    name: ATTACKS[name].title + ("" if name in PAPER_TABLE2 else " (not in the paper)")
    for name in (*list_attacks(), "watermark")
}
TITLES |= {
    "equation2": "Plain blend, equation 2 (not in the paper)",
    "clean": "No attack (clean victim)",
}
CLEAN = "clean"
RECIPES = ("plain", "corrupted")
_TRAINED = {
    "plain": "Victims are trained on images as they are.",
    "corrupted": "Victims are trained on randomly corrupted images.",
}
# What a record must have before a table can be made of it.
_NEEDED = {
    "data": ("name", "n_train", "n_test"),
    "cell": ("attack", "recipe", "corruptions", "cda_gap"),
    "victim": ("attack", "recipe", "history", "steps", "poisoned", "learned"),
    "stealth": ("attack", "n", "stealth"),
}


class Run(NamedTuple):
    """One victim: how it was trained, what was planted, with which seed."""

    recipe: str
    attack: str
    seed: int


class Failure(NamedTuple):
    """A stage that did not come to its end, and why."""

    stage: str
    attack: str | None
    recipe: str | None
    seed: int | None
    reason: str


class Number(NamedTuple):
    """One figure of a table. Rates are fractions, whatever the table prints."""

    recipe: str
    attack: str
    measure: str  # "cda", "asr", "ftr", "psnr", "steps" ...
    column: str  # the corruption or average, empty where there is none
    source: str  # "measured" or "paper"
    seed: int | None  # None for the paper, which does not say
    value: float


@dataclass(frozen=True)
class AttackRecords:
    """What one folder holds.

    ``cells``, ``victims`` and ``stealth`` give a record's values by run; a trigger's stealth has
    no recipe, and stands under "". ``data`` describes the images, and under "planned" perhaps
    which attacks and seeds were asked for; without it every attack of the table is expected.
    """

    data: Mapping[str, Any]
    cells: Mapping[Run, Mapping[str, Any]]
    victims: Mapping[Run, Mapping[str, Any]]
    stealth: Mapping[Run, Mapping[str, Any]]
    failures: Sequence[Failure]

    @property
    def name(self) -> str:
        """The data set's."""
        return str(self.data["name"])

    def seeds(self, recipe: str) -> list[int]:
        """The seeds that a recipe ("" for stealth) was planned, run or tried with."""
        found = {run.seed for run in self._runs if run.recipe == recipe}
        tried = {f.seed for f in self.failures if f.recipe in (None, recipe) and f.seed is not None}
        return sorted(found | tried | set(self._planned("seeds")))

    def started(self, recipe: str) -> bool:
        """Was a victim of this recipe trained or measured, or tried to be?"""
        return recipe in {r.recipe for r in self._runs} | {f.recipe for f in self.failures}

    def attacks(self) -> list[str]:
        """The attacks to expect, in the order of the table; the clean victim comes last."""
        found = {run.attack for run in self._runs} | {f.attack for f in self.failures if f.attack}
        expected = (found | set(self._planned("attacks") or TITLES)) - {CLEAN}
        known = [name for name in TITLES if name in expected]
        return [*known, *sorted(expected - TITLES.keys()), CLEAN]

    @property
    def _runs(self) -> tuple[Run, ...]:
        return (*self.cells, *self.victims, *self.stealth)

    def _planned(self, what: str) -> Sequence[Any]:
        return self.data.get("planned", {}).get(what, ())

    def why(self, kind: str, run: Run) -> str:
        """Why a run has no record ``kind`` ("cell" or "stealth"): what its stages left behind."""
        mine = {
            f.stage.partition("-")[0]: f.reason
            for f in self.failures
            if f.attack in (None, run.attack)
            and f.seed in (None, run.seed)
            # Stealth has no recipe, but may wait for a trigger that a victim's training finishes.
            and (not run.recipe or f.recipe in (None, run.recipe))
        }
        road = (kind, "trigger", "victim", "data")
        return next((mine[stage] for stage in road if stage in mine), "not run")


def read_study(out: str | Path) -> AttackRecords:
    """Read an attack study's folder: ``records/``, and ``failures/`` if there is one.

    Raises:
        ValueError: No records, none of an attack study, of more than one data set, or one that
            is not what its name says.
    """
    out = Path(out)
    records = read_records(out / "records")
    if "data" not in records:
        raise ValueError(f"expected the record data.json in {out / 'records'}, found none")
    _check("data", records["data"])
    found: dict[str, dict[Run, Mapping[str, Any]]] = {"cell": {}, "victim": {}, "stealth": {}}
    for name, record in records.items():
        kind = name.partition("-")[0]
        if kind in found:
            _check(name, record)
            found[kind][_run(name, kind, record)] = record.values
    failures = read_failures(out / "failures")
    if not any(found.values()) and not failures:
        raise ValueError(f"expected records of attacks in {out / 'records'}, found none")
    if (count := len({record.data for record in records.values()})) > 1:
        raise ValueError(f"expected the records of one study, got {count} data sets")
    return AttackRecords(
        data=records["data"].values,
        cells=found["cell"],
        victims=found["victim"],
        stealth=found["stealth"],
        failures=failures,
    )


def read_failures(folder: str | Path) -> list[Failure]:
    """Read why stages failed, one small JSON file each, in the order of their names.

    Raises:
        ValueError: A file that is not JSON or lacks a field.
    """
    failures = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            failures.append(Failure(*(found[name] for name in Failure._fields)))
        except (ValueError, KeyError, TypeError) as error:
            names = ", ".join(Failure._fields)
            raise ValueError(f"expected {names} in failures/{path.name}, got {error!r}") from error
    return failures


def describe(study: AttackRecords, recipe: str = "") -> str:
    """What the figures of a page were measured on, in a few plain sentences."""
    data, seeds = study.data, study.seeds(recipe)
    said = [
        f"{data['name']}: {data['n_train']} training images, rates over "
        f"{data.get('n_measured', data['n_test'])} test images."
    ]
    if "profile" in data:
        said.append(f"Profile {data['profile']}.")
    if len(seeds) == 1:
        said.append(f"Seed {seeds[0]}: one, so there is no spread.")
    elif seeds:
        names = ", ".join(map(str, seeds))
        said.append(f"Seeds {names}: mean ± sample standard deviation.")
    if recipe:
        said.append(_TRAINED[recipe])
    return " ".join(said)


def _check(name: str, record: Record) -> None:
    missing = [key for key in _NEEDED[name.partition("-")[0]] if key not in record.values]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in the record {name}, found none")


def _run(name: str, kind: str, record: Record) -> Run:
    """The run that a record belongs to; its name ends in the seed."""
    values = record.values
    recipe = "" if kind == "stealth" else str(values["recipe"])
    attack = str(values["attack"])
    start = "-".join(part for part in (kind, recipe, attack) if part) + "-"
    seed = name.removeprefix(start)
    if not name.startswith(start) or not seed.isdecimal():
        raise ValueError(f"expected a record named {start}SEED, got {name}")
    return Run(recipe, attack, int(seed))


__all__ = [
    "CLEAN",
    "RECIPES",
    "TITLES",
    "AttackRecords",
    "Failure",
    "Number",
    "Run",
    "describe",
    "read_failures",
    "read_study",
]
