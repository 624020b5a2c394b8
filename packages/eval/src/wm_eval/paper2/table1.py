"""The paper's Table 1 with our figures in it: indices, cases, and clean models that are flagged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import Number
from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import plus_minus
from wm_eval.paper2.cells import detector_title, number, page, spread, where
from wm_eval.paper2.paper import ATTACK, PAPER_TABLE1, SEEDS, PaperDetection
from wm_eval.paper2.summary import DetectRecords, named
from wm_eval.tables import ABSENT, Table, percent

CASES = (1, 2, 3, 4)
_NOTE = (
    "Index: the paper's, over all labels, of the clean and of the backdoored models; mean ± sample "
    "standard deviation. Cases of the backdoored models: 1 only the target is named, 2 the target "
    "and another label, 3 only other labels, 4 none. The paper's rule names every label with an "
    "index above 2; the default rule is the calibrated one, and names labels where its verdict is "
    "backdoored. n: clean and backdoored models. In brackets: what the paper prints, for WaNet and "
    f"networks of full width, {SEEDS} models each."
)


def detection_page(experiments: Sequence[DetectRecords]) -> Page:
    """Table 1: the anomaly index of clean and backdoored models, and the four cases.

    Args:
        experiments: One or more folders' records: networks and data sets below each other.
    """
    rows, numbers = [], []
    for one in experiments:
        for attack in one.attacks():
            for detector in one.detectors():
                if one.of(detector, attack):
                    rows.append(_detection_row(one, attack, detector))
                    numbers += _detection_numbers(one, attack, detector)
    headers = (
        "data",
        "network",
        "attack",
        "detector",
        "index, clean",
        "index, backdoored",
        "cases 1-4, paper's rule",
        "cases 1-4, default rule",
        "clean models flagged, paper's rule",
        "clean models flagged, default rule",
        "n",
        "lowest ASR",
    )
    table = Table("detection", "Detection", headers, tuple(rows), _NOTE)
    title = "Detection of backdoored models (reverse-generator paper, Table 1)"
    return page("detection", title, experiments, table, numbers)


def cases(scans: Iterable[Mapping[str, Any]], rule: str = "") -> tuple[int, ...]:
    """How often each of the four cases occurred, under the default rule or ("paper_") the paper's.

    Args:
        scans: The values of scans of backdoored models.
        rule: "" or "paper_".
    """
    found = [scan[f"{rule}case"] for scan in scans]
    return tuple(found.count(case) for case in CASES)


def _detection_row(one: DetectRecords, attack: str, detector: str) -> tuple[str, ...]:
    clean, bad = one.of(detector, CLEAN), one.of(detector, attack)
    paper = _printed(one, attack, detector)
    asr = [victim["asr"] for victim in one.rates_of(attack)]
    return (
        *where(one, attack),
        detector_title(detector),
        _index(clean, paper and paper.clean),
        _index(bad, paper and paper.backdoored),
        _joined(cases(bad, "paper_")) + (f" ({_joined(paper.cases)})" if paper else ""),
        _joined(cases(bad)),
        *(_flagged(clean, rule) for rule in ("paper_", "")),
        f"{len(clean)} + {len(bad)}",
        percent(min(asr, default=None)),
    )


def _index(scans: Sequence[Mapping[str, Any]], printed: float | None) -> str:
    """The mean index; where one is infinite, how many are stands beside the mean of the others."""
    finite = [scan["paper_index"] for scan in scans if scan["paper_index"] is not None]
    text = plus_minus(spread(finite))
    if len(finite) < len(scans):
        text += f", {len(scans) - len(finite)} infinite"
    return text if printed is None else f"{text} ({printed:.2f})"


def _flagged(clean: Sequence[Mapping[str, Any]], rule: str) -> str:
    if not clean:
        return ABSENT
    text = f"{sum(bool(named(scan, rule)) for scan in clean)} of {len(clean)}"
    unsure = sum(scan["verdict"] == "inconclusive" for scan in clean)
    return text if rule or not unsure else f"{text}, {unsure} inconclusive"


def _joined(counts: Sequence[int]) -> str:
    return "/".join(map(str, counts))


def _printed(one: DetectRecords, attack: str, detector: str) -> PaperDetection | None:
    if attack != ATTACK:
        return None
    return PAPER_TABLE1.get((one.name, one.model, detector))


def _detection_numbers(one: DetectRecords, attack: str, detector: str) -> list[Number]:
    found = []
    for scan, values in sorted(one.scans.items()):
        if scan.detector == detector and scan.attack in (attack, CLEAN):
            measures = {"paper_index": values["paper_index"], "p_value": values["p_value"]}
            measures |= {key: values.get(key) for key in ("paper_case", "case")}
            found += [
                number(one, scan.attack, measure, detector, scan.seed, value)
                for measure, value in measures.items()
                if value is not None
            ]
    paper = _printed(one, attack, detector)
    if paper is not None:
        for name, value in ((CLEAN, paper.clean), (attack, paper.backdoored)):
            found.append(number(one, name, "paper_index", detector, None, value))
    return found


__all__ = ["CASES", "cases", "detection_page"]
