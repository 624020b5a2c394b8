"""The watermark paper's figure 3: the anomaly index of every attack's victim, and the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES, Number
from wm_eval.attacks.render import Page, write_page
from wm_eval.attacks.spread import plus_minus
from wm_eval.detectors import CALIBRATED
from wm_eval.paper2.cells import detector_title, spread
from wm_eval.paper2.plots import BLUE, INK, RED, new_figure, save_svg
from wm_eval.paper2.summary import Scan, named
from wm_eval.records import Record, read_records
from wm_eval.tables import ABSENT, Table, percent

THRESHOLD = 2.0
_NOTE = (
    "Index: the paper's, mean ± sample standard deviation over seeds; above 2 its rule says "
    "backdoored. The verdict is that of {rule}; named right: it names the target. "
    "The paper prints 0.7 for its own attack, and a figure without numbers for the others."
)
_CALIBRATED = "the calibrated rule"
_OWN = "the detector's own rule, which states no error rate"


def write_index_figure(out: str | Path) -> list[Path]:
    """Draw ``figure3.svg`` and write ``tables/figure3.*`` from the scans in a folder.

    Args:
        out: What `scan_victims` wrote to.

    Raises:
        ValueError: No scans there, or of several detectors.
        RuntimeError: matplotlib is not installed.
    """
    out = Path(out)
    scans = _read(out)
    drawn = _draw(_by_attack(scans), out / "figure3.svg")
    return [drawn, *write_page(out / "tables", index_page(out))]


def index_page(out: str | Path) -> Page:
    """The table beside the figure.

    Args:
        out: What `scan_victims` wrote to.

    Raises:
        ValueError: No scans there, or of several detectors.
    """
    scans = _read(Path(out))
    numbers = tuple(
        Number("plain", scan.attack, "paper_index", scan.detector, "measured", scan.seed, index)
        for scan, values in scans.items()
        if (index := values["paper_index"]) is not None
    )
    headers = ("attack", "index", "index, lower median", "verdict", "named right", "ASR", "n")
    rows = tuple(_row(attack, mine) for attack, mine in _by_attack(scans).items())
    first = next(iter(scans.values()))
    note = _NOTE.format(rule=_CALIBRATED if first["defence"] in CALIBRATED else _OWN)
    table = Table("figure3", "Anomaly index by attack", headers, rows, note)
    about = f"{first['data']}; a defender with {first['n_images']} clean images."
    title = f"{detector_title(first['defence'])}: index by attack (watermark paper, figure 3)"
    return Page("figure3", title, about, (table,), numbers, str(first["data"]))


def _read(out: Path) -> dict[Scan, Mapping[str, Any]]:
    records = read_records(out / "records")
    scans = {_key(record): record.values for record in records.values() if _is_scan(record)}
    if len({scan.detector for scan in scans}) != 1:
        raise ValueError(f"expected the scans of one detector in {out}, got {len(scans)} scans")
    return scans


def _by_attack(
    scans: Mapping[Scan, Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """The scans of every attack in the order of the table."""
    order = list(TITLES)
    attacks = sorted({s.attack for s in scans}, key=lambda a: order.index(a) if a in order else 99)
    return {a: [scans[s] for s in sorted(scans) if s.attack == a] for a in attacks}


def _draw(by_attack: Mapping[str, list[Mapping[str, Any]]], path: Path) -> Path:
    """A bar an attack, a dot a seed; what is infinite is drawn to the top and said so."""
    values = {a: [s["paper_index"] for s in scans] for a, scans in by_attack.items()}
    finite = [x for found in values.values() for x in found if x is not None]
    top = 1.1 * max([*finite, THRESHOLD])
    figure = new_figure(max(5.0, 0.75 * len(values) + 1), 3.6)
    axes = figure.subplots()
    for place, (attack, found) in enumerate(values.items()):
        shown = [top if x is None else x for x in found]
        axes.bar(place, fmean(shown), 0.6, color=BLUE if attack == CLEAN else INK, alpha=0.35)
        axes.plot([place] * len(shown), shown, ".", color=INK)
        if None in found:
            axes.annotate("infinite", (place, top), ha="center", va="bottom", fontsize=8)
    axes.axhline(THRESHOLD, color=RED, linestyle=(0, (4, 3)), linewidth=1.2)
    names = [TITLES.get(attack, attack).partition(" (")[0].partition(",")[0] for attack in values]
    axes.set_xticks(range(len(values)), names, rotation=45, ha="right")
    axes.set_ylim(0, 1.08 * top)
    axes.set_ylabel("anomaly index")
    return save_svg(figure, path)


def _row(attack: str, scans: list[Mapping[str, Any]]) -> tuple[str, ...]:
    verdicts = [scan["verdict"] for scan in scans]
    counts = [(v, verdicts.count(v)) for v in ("backdoored", "inconclusive", "clean")]
    right = [s["true_target"] in named(s) for s in scans if s["true_target"] is not None]
    asr = spread(scan["asr"] for scan in scans if scan["asr"] is not None)
    return (
        TITLES.get(attack, attack),
        *(
            plus_minus(spread(s[key] for s in scans if s[key] is not None))
            for key in ("paper_index", "paper_index_low")
        ),
        ", ".join(f"{count} {verdict}" for verdict, count in counts if count),
        f"{sum(right)} of {len(right)}" if right else ABSENT,
        percent(asr and asr.mean),
        str(len(scans)),
    )


def _key(record: Record) -> Scan:
    return Scan(record.values["defence"], record.values["attack"], record.seed)


def _is_scan(record: Record) -> bool:
    return record.what.startswith("scan-")


__all__ = ["THRESHOLD", "index_page", "write_index_figure"]
