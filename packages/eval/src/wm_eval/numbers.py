"""Records as one tidy list of numbers, of which every table is a view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from defense_reverse import detection_case
from wm_eval.records import Failure, Key, Record, StudyRecords
from wm_eval.titles import CLEAN

# The paper has one mask and one noise and does not say which: two readings, five columns each.
AVERAGES = {
    "avg-pixel": ("none", "mask", "rotation", "noise", "rescale"),
    "avg-block": ("none", "mask-block", "rotation", "salt-pepper", "rescale"),
}
CASES = (1, 2, 3, 4)


class Number(NamedTuple):
    """One number of a table. Rates are fractions, whatever the table prints."""

    measure: str  # "cda", "asr", "psnr", "steps", "paper_index" ...
    key: Key  # of its record, and "corruption" where there are several
    value: float
    source: str = "measured"  # or "paper"


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for one value), and how many values."""

    mean: float
    sd: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    values = list(values)
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def select(
    numbers: Iterable[Number], measure: str, *, source: str = "measured", **key: Any
) -> list[float]:
    """The values of a measure whose key agrees."""
    return [
        n.value
        for n in numbers
        if n.measure == measure and n.source == source and _agrees(n.key, key)
    ]


def numbers(study: StudyRecords) -> tuple[Number, ...]:
    """Every number that tables show, in the order of the records."""
    return tuple(
        Number(measure, key, float(value))
        for record in study.records
        if record.kind in _READERS
        for measure, key, value in _READERS[record.kind](record)
        if value is not None
    )


def keys(study: StudyRecords, kind: str, name: str, **key: Any) -> list[Any]:
    """The different values of one part of the key, sorted."""
    return sorted({r.key[name] for r in study.select(kind=kind, **key) if name in r.key})


def planned(study: StudyRecords, name: str) -> list[Any]:
    """What a study was planned with ("attacks", "seeds", "mitigations" ...), as far as it says."""
    plans = [record.values.get("planned", {}) for record in study.select(kind="study")]
    return list(dict.fromkeys(value for plan in plans for value in plan.get(name, ())))


def reason(study: StudyRecords, kinds: Sequence[str], key: Key) -> str:
    """Why there is no record: the failure of the first of these kinds that belongs to the key."""
    for kind in kinds:
        for failure in study.failures:
            if failure.kind == kind and _compatible(failure, key):
                return failure.reason
    return "not run"


def named(scan: Mapping[str, Any], *, paper: bool = False) -> list[int]:
    """The labels that a scan names: by its verdict, or by the paper's rule (an index above 2)."""
    if paper:
        return list(scan["paper_flagged"])
    return list(scan["suspected"]) if scan["verdict"] == "backdoored" else []


def case(scan: Mapping[str, Any], *, paper: bool = False) -> int:
    """Of a backdoored model: 1 only the target is named, 2 others too, 3 only others, 4 none."""
    return detection_case(named(scan, paper=paper), scan["true_target"])


def victim_asr(study: StudyRecords, scan: Record) -> float | None:
    """The attack success of the victim that was scanned; None for a clean one."""
    if "asr" in scan.values or scan.key["attack"] == CLEAN:
        return scan.values.get("asr")
    same = {n: v for n, v in scan.key.items() if n != "detector"}
    for record in study.select(kind="rates", **same):
        if "none" in record.values["corruptions"]:
            return float(record.values["corruptions"]["none"]["asr"])
    for record in study.select(kind="victim", **same):
        if rows := record.values["history"].get("watched"):
            return float(rows[-1]["asr"])
    return None


def poison_losses(victim: Mapping[str, Any]) -> list[float]:
    """The loss on poisoned images alone, epoch by epoch."""
    rows = victim.get("history", {}).get("watched") or []
    return [row["poison_loss"] for row in rows if row.get("poison_loss") is not None]


Entries = Iterator[tuple[str, Key, float | None]]


def _rates(record: Record) -> Entries:
    corruptions = record.values["corruptions"]
    # A clean victim has no attack that could succeed.
    for measure in ("cda", "ftr") if record.key["attack"] == CLEAN else ("cda", "asr", "ftr"):
        values = {name: metrics[measure] for name, metrics in corruptions.items()}
        for name, columns in AVERAGES.items():
            if all(column in values for column in columns):
                values[name] = fmean(values[column] for column in columns)
        for name, value in values.items():
            yield measure, {**record.key, "corruption": name}, value
    for name, gap in (record.values.get("cda_gap") or {}).items():
        yield "cda_gap", {**record.key, "corruption": name}, gap["value"]


def _stealth(record: Record) -> Entries:
    for measure in ("psnr", "ssim", "lpips"):
        if (values := record.values["stealth"].get(measure)) is not None:
            yield measure, record.key, values["mean"]
    yield "common", record.key, record.values["stealth"].get("common")


def _victim(record: Record) -> Entries:
    values = record.values
    learned, losses = values.get("learned") or {}, poison_losses(values)
    for measure in ("steps", "poisoned", "poisoned_of_target"):
        yield measure, record.key, values.get(measure)
    yield "learned_epoch", record.key, learned.get("epoch")
    yield "exposures", record.key, learned.get("exposures")
    if losses:
        yield "poison_loss_first", record.key, losses[0]
        yield "poison_loss_last", record.key, losses[-1]


def _scan(record: Record) -> Entries:
    yield "paper_index", record.key, record.values["paper_index"]
    yield "p_value", record.key, record.values["p_value"]
    if record.values.get("true_target") is not None:
        yield "case", record.key, case(record.values)
        yield "paper_case", record.key, case(record.values, paper=True)


def _mitigation(record: Record) -> Entries:
    before, after = record.values.get("before"), record.values.get("after")
    for measure in ("cda", "asr"):
        if measure == "cda" or record.key["attack"] != CLEAN:
            yield f"{measure}_before", record.key, before and before[measure]
            yield measure, record.key, after and after[measure]
    yield "der", record.key, record.values.get("der")


_READERS: dict[str, Callable[[Record], Entries]] = {
    "rates": _rates,
    "stealth": _stealth,
    "victim": _victim,
    "scan": _scan,
    "mitigation": _mitigation,
}


def _agrees(key: Key, part: Mapping[str, Any]) -> bool:
    return all(key.get(name) == value for name, value in part.items())


def _compatible(failure: Failure, key: Key) -> bool:
    return all(key[name] == value for name, value in failure.key.items() if name in key)
