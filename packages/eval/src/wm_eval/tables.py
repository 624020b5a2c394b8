"""Tables of a study, rendered from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.records import Record, read_records
from wm_extract import EXTRA_CORRUPTIONS, PAPER_CORRUPTIONS

DEFENCES = {"nc": "Neural Cleanse", "reverse": "Reverse generators"}
VICTIMS = ("clean", "backdoored")
ABSENT = "–"


class Table(NamedTuple):
    """A table of text."""

    name: str  # a short identifier, unique within a study
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def percent(rate: float | None, *, digits: int = 1) -> str:
    """A rate as text: 0.9731 is "97.3 %", None a dash."""
    return ABSENT if rate is None else f"{100 * rate:.{digits}f} %"


def points(difference: Mapping[str, Any]) -> str:
    """A difference of two rates with its interval, in points: "-0.5 (-1.7 to +0.7)"."""
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def with_interval(rate: float, interval: Sequence[float]) -> str:
    """A rate with its interval: "97.3 % (95.7 to 98.3)"."""
    return f"{100 * rate:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def number(value: float | None, *, digits: int = 2) -> str:
    """A plain number as text, None a dash; very small ones in powers of ten."""
    if value is None:
        return ABSENT
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def in_order(names: Iterable[str]) -> list[str]:
    """Corruptions in the order of the papers' tables; a record keeps them by alphabet."""
    known = [*PAPER_CORRUPTIONS, *EXTRA_CORRUPTIONS]
    return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


def stealth_table(record: Record) -> Table:
    """How visible the watermark is, measured on 8-bit images."""
    values = record.values
    units = {"psnr": "PSNR (dB)", "ssim": "SSIM", "linf": "largest change (of 1)", "lpips": "LPIPS"}
    rows: list[tuple[str, ...]] = []
    for name, label in units.items():
        found = values["stealth"].get(name)
        if found is None:
            rows.append((label, f"absent: {values['stealth'][name + '_absent']}", ABSENT, ABSENT))
        else:
            digits = 2 if name == "psnr" else 4
            cells = (number(found[key], digits=digits) for key in ("mean", "p05", "p95"))
            rows.append((label, *cells))
    note = f"Over {values['n']} held-out images, each clamped and rounded to 8 bits first."
    headers = ("measure", "mean", "5th percentile", "95th percentile")
    return Table("stealth", "How visible the watermark is", headers, tuple(rows), note)


def bits_table(record: Record) -> Table:
    """What the extractor reads under each corruption, from marked and from unmarked images."""
    values = record.values
    rows = tuple(
        (
            name,
            percent(found["marked"]),
            percent(found["unmarked"]),
            percent(values["constant_score"]),
            f"{found['false_positives']} of {found['false_n']}",
            f"{found['true_positives']} of {found['false_n']}",
        )
        for name in in_order(values["bits"])
        for found in (values["bits"][name],)
    )
    headers = (
        "corruption",
        "marked images",
        "unmarked images",
        "constant output",
        "unmarked taken for marked",
        "marked taken for marked",
    )
    note = (
        f"Balanced bit accuracy over {values['n']} held-out images of each kind. The mark is one "
        "fixed picture, so this says how surely its presence shows, not how many bits could be "
        "sent. The last two columns use the threshold of the detection table, on its second half."
    )
    return Table("bits", "What the extractor reads", headers, rows, note)


def detection_table(record: Record) -> Table:
    """Is this image marked? True and false positives on images that chose no threshold."""
    found = record.values["detection"]
    rows = (
        (
            "marked, found",
            f"{found['true_positives']} of {found['n']}",
            percent(found["tpr"]),
            f"at least {percent(found['tpr_lower'], digits=2)}",
        ),
        (
            "unmarked, taken for marked",
            f"{found['false_positives']} of {found['n']}",
            percent(found["fpr"]),
            f"at most {percent(found['fpr_upper'], digits=2)}",
        ),
    )
    note = (
        f"The threshold ({found['threshold']:.4g}) was chosen on {found['n_calibration']} other "
        f"images for at most {percent(found['aimed_fpr'])} false positives. "
        "Bounds: exact (Clopper-Pearson), one-sided, 95 %."
    )
    headers = ("images", "count", "rate", "95 % bound")
    return Table("detection", "Is this image marked?", headers, rows, note)


def robustness_table(record: Record) -> Table:
    """Accuracy, attack success and false triggers of both victims under each corruption."""
    victims, gaps = record.values["victims"], record.values["cda_gap"]
    rows = []
    for name in in_order(victims["clean"]):
        clean, bad = victims["clean"][name], victims["backdoored"][name]
        rows.append(
            (
                name,
                with_interval(clean["cda"], clean["cda_interval"]),
                with_interval(bad["cda"], bad["cda_interval"]),
                points(gaps[name]),
                with_interval(bad["asr"], bad["asr_interval"]),
                percent(bad["ftr"]),
                percent(clean["asr"]),
            )
        )
    first = next(iter(victims["clean"].values()))
    headers = (
        "corruption",
        "CDA, clean victim",
        "CDA, backdoored victim",
        "difference (points)",
        "ASR, backdoored victim",
        "false triggers",
        "ASR, clean victim",
    )
    note = (
        f"CDA over {first['n_clean']} test images; ASR and false triggers over the "
        f"{first['n_attack']} that count for the attack. Intervals: Wilson, 95 %; the "
        "difference is paired by image (Bonett and Price's adjusted Wald interval). Order: "
        "trigger, 8 bits, corruption, classifier."
    )
    return Table("robustness", "Accuracy and attack success", headers, tuple(rows), note)


def verdict_table(records: Mapping[str, Record]) -> Table:
    """What each defence says about each victim, by the default rule and by the paper's."""
    rows = []
    for defence, title in DEFENCES.items():
        for victim in VICTIMS:
            record = records.get(f"scan-{defence}-{victim}")
            if record is None:
                continue
            found = record.values
            rows.append(
                (
                    title,
                    victim,
                    found["verdict"],
                    _labels(found["suspected"]),
                    number(found["p_value"], digits=4),
                    number(found["paper_index"]),
                    _labels(found["paper_flagged"]),
                )
            )
    headers = (
        "defence",
        "victim",
        "verdict",
        "labels named",
        "p-value",
        "paper's index",
        "labels by the paper's rule",
    )
    note = (
        "The default rule names a label whose score stands out from the other labels' (p at most "
        "alpha, corrected for the number of labels) and lies well below their median. The paper's "
        "rule, printed as measured, names every label more than 2 median deviations below the "
        "median; on ten labels it does so for about a third of clean classifiers by chance alone."
    )
    return Table("verdicts", "What the defences say", headers, tuple(rows), note)


def labels_table(record: Record, defence: str, victim: str) -> Table:
    """One defence's score for every label of one victim."""
    rows = tuple(
        (
            str(label["label"]),
            number(label["score"], digits=4),
            number(label["ratio"]),
            percent(label["success_rate"]),
            "yes" if label["converged"] else "no",
            number(label["p_value"], digits=4),
            number(label["paper_index"]),
        )
        for label in record.values["labels"]
    )
    headers = (
        "label",
        "score",
        "score / median",
        "success",
        "reached the floor",
        "p-value",
        "paper's index",
    )
    title = f"{DEFENCES[defence]}, {victim} victim, label by label"
    return Table(f"labels-{defence}-{victim}", title, headers, rows, record.values["reason"])


def cleaning_table(records: Mapping[str, Record]) -> Table:
    """Accuracy and attack success before and after cleaning; or why nothing was cleaned."""
    rows = []
    for defence, title in DEFENCES.items():
        record = records.get(f"cleaning-{defence}")
        if record is None:
            continue
        found = record.values
        if not found["done"]:
            rows.append((title, f"not cleaned: {found['why']}", *(ABSENT,) * 6))
            continue
        before, after = found["before"], found["after"]
        rows.append(
            (
                title,
                f"label {found['label']}",
                with_interval(before["cda"], before["cda_interval"]),
                with_interval(after["cda"], after["cda_interval"]),
                points(found["cda_change"]),
                with_interval(before["asr"], before["asr_interval"]),
                with_interval(after["asr"], after["asr_interval"]),
                with_interval(found["control"]["asr"], found["control"]["asr_interval"]),
            )
        )
    headers = (
        "defence",
        "cleaned with",
        "CDA before",
        "CDA after",
        "change (points)",
        "ASR before",
        "ASR after",
        "ASR, control",
    )
    note = (
        "ASR is that of the true trigger. Only a label that the scan named is ever used. The "
        "control is fine-tuned on the same images for as many steps, without the reversed trigger: "
        "what it removes, the defence did not need the label for."
    )
    return Table("cleaning", "Before and after cleaning", headers, tuple(rows), note)


def exports_table(record: Record) -> Table:
    """How closely each exported model answers like the one it came from."""
    rows = [
        (
            model,
            {"onnx": "ONNX Runtime", "torchscript": "TorchScript"}[form],
            f"{found['max_abs']:.1e}",
            f"{found['max_rel']:.1e}" if found["relative"] else ABSENT,
            ", ".join(map(str, found["batches"])),
        )
        for model, forms in record.values["models"].items()
        for form, found in forms.items()
    ]
    rows += [
        (model, f"not exported: {why}", *(ABSENT,) * 3)
        for model, why in record.values["absent"].items()
    ]
    headers = ("model", "form", "largest difference", "relative to the largest", "batch sizes")
    note = (
        f"Reloaded from the file and compared on test images; {record.values['tolerance']:g} is "
        "allowed, absolute on images in [0, 1] and relative on logits."
    )
    return Table("exports", "Exported models against the trained ones", headers, tuple(rows), note)


def study_tables(records: Mapping[str, Record]) -> list[Table]:
    """Every table that these records have the figures for, in the order of the story.

    Raises:
        ValueError: Records of different seeds or data sets: they belong to different studies.
    """
    for what, found in (
        ("seed", {r.seed for r in records.values()}),
        ("data set", {r.data for r in records.values()}),
    ):
        if len(found) > 1:
            raise ValueError(f"expected the records of one study, got {len(found)} {what}s")
    tables = []
    if "watermark" in records:
        mark = records["watermark"]
        tables += [stealth_table(mark), bits_table(mark), detection_table(mark)]
    if "robustness" in records:
        tables.append(robustness_table(records["robustness"]))
    scans = {name: r for name, r in records.items() if name.startswith("scan-")}
    if scans:
        tables.append(verdict_table(records))
        tables += [
            labels_table(scans[f"scan-{defence}-{victim}"], defence, victim)
            for defence in DEFENCES
            for victim in VICTIMS
            if f"scan-{defence}-{victim}" in scans
        ]
    if any(name.startswith("cleaning-") for name in records):
        tables.append(cleaning_table(records))
    if "exports" in records:
        tables.append(exports_table(records["exports"]))
    return tables


def to_markdown(table: Table) -> str:
    """A table in Markdown, with its title and note."""
    lines = [f"### {table.title}", "", _row(table.headers), _row(("---",) * len(table.headers))]
    lines += [_row(row) for row in table.rows]
    return "\n".join(lines + (["", table.note] if table.note else [])) + "\n"


def render_markdown(folder: str | Path) -> str:
    """Every table of the records in a folder, in Markdown.

    Raises:
        ValueError: No records there, or records of different studies.
    """
    return "\n".join(to_markdown(table) for table in study_tables(read_records(folder)))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _labels(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels)) if labels else "none"
