"""The records of the experiment, sorted: what each victim is, and what each detector said of it.

Two forms are read: that of `run_detect`, and the older one, whose clean victim is called "none"
and whose victims are measured in the record of their training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import Failure, read_failures
from wm_eval.records import Record, read_records

_NONE = "none"  # what the older records call the clean victim


class Scan(NamedTuple):
    """One detector's look at one victim."""

    detector: str
    attack: str  # "clean" for the clean victim
    seed: int


class Cleaning(NamedTuple):
    """One way to clean one attacked victim."""

    method: str
    share: float
    lr: float
    attack: str
    seed: int


@dataclass(frozen=True)
class DetectRecords:
    """What one folder holds: a record's values by what they are about.

    ``data`` is empty, and ``name`` with it, where older records do not say what the images are.
    ``cleanings`` are those of the table, ``rates`` those of the sweep of learning rates.
    """

    data: Mapping[str, Any]
    model: str
    width: int | None
    victims: Mapping[tuple[str, int], Mapping[str, Any]]
    scans: Mapping[Scan, Mapping[str, Any]]
    cleanings: Mapping[Cleaning, Mapping[str, Any]]
    rates: Mapping[Cleaning, Mapping[str, Any]]
    pictures: Mapping[Scan, Mapping[str, Any]]
    failures: Sequence[Failure] = ()

    @property
    def name(self) -> str:
        """The data set's."""
        return str(self.data.get("name", ""))

    def attacks(self) -> list[str]:
        """The attacks of which there is a scan or a victim."""
        found = {scan.attack for scan in self.scans} | {attack for attack, _ in self.victims}
        return sorted(found - {CLEAN})

    def detectors(self) -> list[str]:
        """The detectors that have scanned anything."""
        return sorted({scan.detector for scan in self.scans})

    def of(self, detector: str, attack: str) -> list[Mapping[str, Any]]:
        """The scans of a detector on the victims of an attack, seed by seed."""
        wanted = [s for s in self.scans if (s.detector, s.attack) == (detector, attack)]
        return [self.scans[scan] for scan in sorted(wanted)]

    def rates_of(self, attack: str) -> list[Mapping[str, Any]]:
        """The measured victims of an attack, seed by seed."""
        return [self.victims[key] for key in sorted(self.victims) if key[0] == attack]


def read_detection(out: str | Path) -> DetectRecords:
    """Read an experiment's folder: ``records/``, and ``failures/`` if there is one.

    Raises:
        ValueError: No records, or none of this experiment.
    """
    out = Path(out)
    records = read_records(out / "records")
    return sort_records(records, read_failures(out / "failures"))


def sort_records(records: Mapping[str, Record], failures: Sequence[Failure] = ()) -> DetectRecords:
    """Sort the records of an experiment.

    Raises:
        ValueError: No measured victim and no scan among them, or a record that is not what its
            name says.
    """
    victims: dict[tuple[str, int], Mapping[str, Any]] = {}
    looks: dict[str, dict[Scan, Mapping[str, Any]]] = {"scan": {}, "pictures": {}}
    cleanings: dict[str, dict[Cleaning, Mapping[str, Any]]] = {"cleaning": {}, "rate": {}}
    for name, record in records.items():
        kind, values = name.partition("-")[0], record.values
        try:
            if kind == "victim" and "asr" in values:
                victims[_attack(values), record.seed] = values
            elif kind in looks:
                looks[kind][Scan(values["defence"], _attack(values), record.seed)] = values
            elif kind in cleanings:
                method, share, lr = (values[key] for key in ("method", "share", "lr"))
                way = Cleaning(method, share, lr, values["attack"], record.seed)
                cleanings[kind][way] = values
        except KeyError as error:
            raise ValueError(f"expected {error} in the record {name}, found none") from error
    if not victims and not looks["scan"] and not failures:
        raise ValueError("expected records of the detection experiment, found none")
    model, width = _network(records)
    data = records["data"].values if "data" in records else {}
    return DetectRecords(
        data,
        model,
        width,
        victims,
        looks["scan"],
        cleanings["cleaning"],
        cleanings["rate"],
        looks["pictures"],
        failures,
    )


def summarise_detection(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row for every defence and attack: how often each rule names the target, or anything.

    Args:
        records: What `read_records` gives for an experiment's folder, of either form.

    Returns:
        Rows with ``defence``, ``attack``, ``n``, ``named_target`` and ``named_other`` (counts of
        scans under the default rule), the same for the paper's rule, the smallest ASR of the
        victims (None if none was measured), and the mean of the paper's index (None if one is
        infinite).

    Raises:
        ValueError: No scan among the records.
    """
    scans = [r.values for name, r in sorted(records.items()) if name.startswith("scan-")]
    if not scans:
        raise ValueError("expected the records of a detection experiment, found no scan in them")
    rows = []
    for defence, attack in sorted({(s["defence"], s["attack"]) for s in scans}):
        mine = [s for s in scans if (s["defence"], s["attack"]) == (defence, attack)]
        asr = [
            r.values["asr"]
            for name, r in records.items()
            if name.startswith("victim-") and r.values.get("attack") == attack and "asr" in r.values
        ]
        row: dict[str, Any] = {"defence": defence, "attack": attack, "n": len(mine)}
        for rule in ("", "paper_"):
            target = [s["true_target"] in named(s, rule) for s in mine]
            other = [bool(set(named(s, rule)) - {s["true_target"]}) for s in mine]
            row |= {f"{rule}named_target": sum(target), f"{rule}named_other": sum(other)}
        indices = [s["paper_index"] for s in mine]
        row["paper_index_mean"] = None if None in indices else fmean(indices)
        row["asr_min"] = min(asr, default=None)
        rows.append(row)
    return rows


def named(scan: Mapping[str, Any], rule: str = "") -> list[int]:
    """The labels that a scan named: none unless its verdict is backdoored, by the default rule.

    Args:
        scan: A scan's values.
        rule: "" for the default rule, "paper_" for the paper's, an index above 2.
    """
    if rule:
        return list(scan["paper_flagged"])
    return list(scan["suspected"]) if scan["verdict"] == "backdoored" else []


def _attack(values: Mapping[str, Any]) -> str:
    attack = str(values["attack"])
    return CLEAN if attack == _NONE else attack


def _network(records: Mapping[str, Record]) -> tuple[str, int | None]:
    """Which classifier the victims are, from the settings of their training."""
    for name, record in records.items():
        settings = record.config.get("settings", {})
        network = settings.get("victim", settings)
        if name.startswith("victim-") and "model" in network:
            return str(network["model"]), network.get("width")
    return "", None


__all__ = [
    "Cleaning",
    "DetectRecords",
    "Scan",
    "named",
    "read_detection",
    "sort_records",
    "summarise_detection",
]
