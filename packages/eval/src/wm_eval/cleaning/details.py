"""The long tables: every scan, every cleaning with its intervals, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES as ATTACK_TITLES
from wm_eval.cleaning.config import TITLES
from wm_eval.cleaning.gather import CleaningRecords
from wm_eval.tables import ABSENT, DEFENCES, Table, points, with_interval


def scan_table(study: CleaningRecords) -> Table:
    """What every scan named, before anything was cleaned."""
    rows = tuple(
        (
            ATTACK_TITLES[scan.values["attack"]],
            DEFENCES[scan.values["defence"]],
            str(scan.seed),
            scan.values["verdict"],
            _labels(scan.values["named"]),
            ABSENT if scan.values["attack"] == CLEAN else str(scan.values["forced_label"]),
            scan.values.get("reason", ""),
        )
        for attack in (CLEAN, *study.attacks)
        for scan in study.scans
        if scan.values["attack"] == attack
    )
    headers = ("victim", "scan", "seed", "verdict", "labels named", "true target", "reason")
    return Table("cleaning-scans", "What the scans said", headers, rows)


def rescan_table(study: CleaningRecords) -> Table:
    """What the same scan says of the cleaned model."""
    rows = tuple(
        (
            ATTACK_TITLES[scan.values["attack"]],
            TITLES[scan.values["method"]],
            f"{100 * scan.values['share']:g} %",
            str(scan.seed),
            f"{scan.values['verdict_before']} ({_labels(scan.values['named_before'])})",
            f"{scan.values['verdict']} ({_labels(scan.values['named'])})",
            "yes" if scan.values["agrees"] else "no",
        )
        for attack in (CLEAN, *study.attacks)
        for scan in study.rescans
        if scan.values["attack"] == attack
    )
    headers = ("victim", "method", "clean data", "seed", "before", "after", "agrees")
    note = (
        f"{sum(s.values['agrees'] for s in study.rescans)} of {len(study.rescans)} cleaned models "
        "are found clean by the scan that had named a label in them."
    )
    return Table("cleaning-rescans", "Scanned again after cleaning", headers, rows, note)


def details_table(study: CleaningRecords) -> Table:
    """Every cleaning with its changes and intervals."""
    rows = tuple(
        _detail(cleaned.seed, cleaned.values)
        for attack in (CLEAN, *study.attacks)
        for method in study.methods
        for forced in (False, True)
        for cleaned in study.of(attack, method, forced=forced)
    )
    head = ("victim", "method", "clean data", "seed", "images", "labels", "ACC after")
    headers = (*head, "change of ACC, points", "ASR after", "change of ASR, points", "DER")
    note = (
        "Rates with Wilson's 95 % intervals; changes with intervals for pairs, since both models "
        "see the same images. The rating's interval takes the worst and best corner of both."
    )
    return Table("cleaning-details", "Every cleaning", headers, rows, note)


def missing_table(study: CleaningRecords) -> Table:
    """The cleanings that were asked for and are not there, and why."""
    planned = study.planned
    there = {
        (c.values["attack"], c.values["method"], c.values["share"], c.seed)
        for c in study.cleanings
        if not c.values["forced"]
    }
    rows = tuple(
        (
            ATTACK_TITLES[attack],
            TITLES[method],
            f"{100 * share:g} %",
            str(seed),
            study.why(f"clean-{method}-{share:g}-{attack}-{seed}", attack, seed),
        )
        for attack in planned["attacks"]
        for method in planned["methods"]
        for share in planned["shares"]
        for seed in planned["seeds"]
        if (attack, method, share, seed) not in there
    )
    headers = ("victim", "method", "clean data", "seed", "reason")
    return Table("cleaning-missing", "What is missing, and why", headers, rows)


def _detail(seed: int, values: Mapping[str, Any]) -> tuple[str, ...]:
    after, attacked = values["after"], values["asr_change"] is not None
    title = TITLES[values["method"]]
    head = (
        ATTACK_TITLES[values["attack"]],
        f"{title}, forced" if values["forced"] else title,
        f"{100 * values['share']:g} %",
        str(seed),
        str(values["images"]),
        _labels(values["labels"]),
    )
    if not values["cleaned"]:
        return (*head, "not cleaned", *(ABSENT,) * 4)
    cells = (with_interval(after["cda"], after["cda_interval"]), points(values["acc_change"]))
    if not attacked:
        return (*head, *cells, *(ABSENT,) * 3)
    low, high = values["der_interval"]
    return (
        *head,
        *cells,
        with_interval(after["asr"], after["asr_interval"]),
        points(values["asr_change"]),
        f"{values['der']:.3f} ({low:.3f} to {high:.3f})",
    )


def _labels(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels)) or ABSENT


__all__ = ["details_table", "missing_table", "rescan_table", "scan_table"]
