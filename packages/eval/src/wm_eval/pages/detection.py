"""What detectors say of clean and backdoored models, beside what the papers print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wm_eval import paper
from wm_eval.numbers import CASES, Number, case, keys, named, numbers, spread, victim_asr
from wm_eval.records import Record, StudyRecords
from wm_eval.render import ABSENT, Page, Table, percent, plus_minus, split_headers
from wm_eval.titles import (
    ATTACKS,
    CLEAN,
    DATA,
    NETWORKS,
    attack_title,
    detector_title,
    in_order,
)

THRESHOLD = 2.0  # of the paper's rule
_CASES_NOTE = (
    "Index: the paper's, over all labels, of the clean and of the backdoored models; mean ± sample "
    "standard deviation. Cases of the backdoored models: 1 only the target is named, 2 the target "
    "and another label, 3 only other labels, 4 none. The paper's rule names every label with an "
    "index above 2; the default rule is the calibrated one, and names labels where its verdict is "
    "backdoored. n: clean and backdoored models. In brackets: what the paper prints, for WaNet and "
    f"networks of full width, {paper.DEFENCE_SEEDS} models each."
)
_INDEX_NOTE = (
    "Index: the paper's, mean ± sample standard deviation over seeds; above 2 its rule says "
    "backdoored. The verdict is that of {rule}; named right: it names the target. "
    "The paper prints 0.7 for its own attack, and a figure without numbers for the others."
)


def scans_of(study: StudyRecords, detector: str, attack: str) -> list[Mapping[str, Any]]:
    """The scans by a detector of the victims of an attack, seed by seed."""
    records = study.select(kind="scan", detector=detector, attack=attack)
    return [r.values for r in sorted(records, key=lambda r: r.key["seed"])]


def victim_rates(study: StudyRecords, attack: str) -> dict[int, Mapping[str, Any]]:
    """Accuracy and attack success of the victims without a corruption, by seed."""
    return {
        int(r.key["seed"]): r.values["corruptions"]["none"]
        for r in study.select(kind="rates", attack=attack)
        if "none" in r.values["corruptions"]
    }


def network(study: StudyRecords) -> tuple[str, int | None]:
    """Architecture and width of the victims, from the settings of their training."""
    for record in study.select(kind="victim"):
        settings = record.settings.get("victim", record.settings)
        if "model" in settings:
            return str(settings["model"]), settings.get("width")
    return "", None


def data_name(study: StudyRecords) -> str:
    """The name of the data set, "" where no record says it."""
    images = study.select(kind="images")
    return str(images[0].values.get("name", "")) if images else ""


def where(study: StudyRecords, attack: str) -> tuple[str, str, str]:
    """Data set, network and attack as tables call them."""
    model, width = network(study)
    title = NETWORKS.get(model, model)
    if width is not None and model != "wanet-mnist":
        title += f", width {width}"
    data = data_name(study)
    return DATA.get(data, data) or ABSENT, title or ABSENT, attack_title(attack)


def missing(study: StudyRecords, name: str) -> list[Table]:
    """The stages that failed, as a table if there are any."""
    rows = tuple((failure.id, failure.reason) for failure in study.failures)
    note = "Stages that failed; what needs them is missing above."
    headers = ("stage", "reason")
    return [Table(f"{name}-missing", "Missing", headers, rows, note)] if rows else []


def images_line(study: StudyRecords) -> str:
    """How many images were trained on and measured on."""
    images = study.select(kind="images")
    if not images:
        return ""
    values = images[0].values
    name = DATA.get(values["name"], values["name"])
    return (
        f"{name}: {values['n_train']} training images, rates over {values['n_measured']} test "
        "images."
    )


def detection_page(study: StudyRecords) -> Page:
    """The anomaly index of clean and backdoored models, and the paper's four cases.

    Source: Zheng, Hua and Zhang, Table 1.
    """
    rows, printed = [], []
    detectors = keys(study, "scan", "detector")
    for attack in in_order(set(keys(study, "scan", "attack")) - {CLEAN}, ATTACKS):
        for detector in detectors:
            if scans_of(study, detector, attack):
                rows.append(_detection_row(study, attack, detector))
                printed += _printed_numbers(study, attack, detector)
    headers = split_headers(
        "data | network | attack | detector | index, clean | index, backdoored | cases 1-4, "
        "paper's rule | cases 1-4, default rule | clean models flagged, paper's rule | clean "
        "models flagged, default rule | n | lowest ASR"
    )
    shown = {"paper_index", "p_value", "case", "paper_case"}
    every = (*(n for n in numbers(study) if n.measure in shown), *printed)
    tables = [Table("detection", "Detection", headers, tuple(rows), _CASES_NOTE)]
    title = "Detection of backdoored models (reverse-generator paper, Table 1)"
    tables += missing(study, "detection")
    return Page("detection", title, images_line(study), tuple(tables), every)


def cases(scans: Iterable[Mapping[str, Any]], *, rule: str = "") -> tuple[int, ...]:
    """How often each of the four cases occurs, by the verdicts or (rule "paper") by the index."""
    counted = [case(scan, paper=rule == "paper") for scan in scans]
    return tuple(counted.count(one) for one in CASES)


def index_page(study: StudyRecords, detector: str) -> Page:
    """The anomaly index of every attack's victims under one detector.

    Raises:
        ValueError: No scans by it.

    Source: Wang et al., "Spy-Watermark", figure 3.
    """
    by_attack = scans_by_attack(study, detector)
    first = next(iter(by_attack.values()))[0]
    rows = tuple(_index_row(study, attack, scans) for attack, scans in by_attack.items())
    headers = ("attack", "index", "index, lower median", "verdict", "named right", "ASR", "n")
    own = "the detector's own rule, which states no error rate"
    calibrated = first.values.get("calibrated")
    note = _INDEX_NOTE.format(rule="the calibrated rule" if calibrated else own)
    every = tuple(
        n for n in numbers(study) if n.measure == "paper_index" and n.key["detector"] == detector
    )
    about = f"{data_name(study)}; a defender with {first.values['n_images']} clean images."
    title = f"{detector_title(detector)}: index by attack (watermark paper, figure 3)"
    tables = (Table("index", "Anomaly index by attack", headers, rows, note),)
    return Page(f"index-{detector}", title, about, tables, every)


def scans_by_attack(study: StudyRecords, detector: str) -> dict[str, list[Record]]:
    """The scans by a detector, by attack in the order of the tables.

    Raises:
        ValueError: No scans by it.
    """
    scans = study.select(kind="scan", detector=detector)
    if not scans:
        raise ValueError(f"expected scans by the detector {detector}, got none")
    attacks = in_order([str(r.key["attack"]) for r in scans], ATTACKS)
    return {attack: [r for r in scans if r.key["attack"] == attack] for attack in attacks}


def _detection_row(study: StudyRecords, attack: str, detector: str) -> tuple[str, ...]:
    clean, bad = scans_of(study, detector, CLEAN), scans_of(study, detector, attack)
    printed = _printed(study, attack, detector)
    asr = [rates["asr"] for rates in victim_rates(study, attack).values()]
    by_paper = _joined(cases(bad, rule="paper"))
    return (
        *where(study, attack),
        detector_title(detector),
        _index(clean, printed and printed.clean),
        _index(bad, printed and printed.backdoored),
        by_paper + (f" ({_joined(printed.cases)})" if printed else ""),
        _joined(cases(bad)),
        _flagged(clean, paper_rule=True),
        _flagged(clean, paper_rule=False),
        f"{len(clean)} + {len(bad)}",
        percent(min(asr, default=None)),
    )


def _index(scans: Sequence[Mapping[str, Any]], printed: float | None) -> str:
    """The mean of the finite indices, how many are infinite, and what the paper prints."""
    finite = [scan["paper_index"] for scan in scans if scan["paper_index"] is not None]
    text = plus_minus(spread(finite))
    if len(finite) < len(scans):
        text += f", {len(scans) - len(finite)} infinite"
    return text if printed is None else f"{text} ({printed:.2f})"


def _flagged(clean: Sequence[Mapping[str, Any]], *, paper_rule: bool) -> str:
    if not clean:
        return ABSENT
    text = f"{sum(bool(named(scan, paper=paper_rule)) for scan in clean)} of {len(clean)}"
    unsure = sum(scan["verdict"] == "inconclusive" for scan in clean)
    return text if paper_rule or not unsure else f"{text}, {unsure} inconclusive"


def _joined(counts: Sequence[int]) -> str:
    return "/".join(map(str, counts))


def _printed(study: StudyRecords, attack: str, detector: str) -> paper.Detection | None:
    if attack != paper.DEFENCE_ATTACK:
        return None
    return paper.DETECTION.get((data_name(study), network(study)[0], detector))


def _printed_numbers(study: StudyRecords, attack: str, detector: str) -> list[Number]:
    row = _printed(study, attack, detector)
    if row is None:
        return []
    pairs = ((CLEAN, row.clean), (attack, row.backdoored))
    return [
        Number("paper_index", {"attack": name, "detector": detector}, value, "paper")
        for name, value in pairs
    ]


def _index_row(study: StudyRecords, attack: str, scans: Sequence[Record]) -> tuple[str, ...]:
    values = [scan.values for scan in scans]
    verdicts = [scan["verdict"] for scan in values]
    counts = [(v, verdicts.count(v)) for v in ("backdoored", "inconclusive", "clean")]
    right = [s["true_target"] in named(s) for s in values if s["true_target"] is not None]
    rates = [victim_asr(study, scan) for scan in scans]
    asr = spread(rate for rate in rates if rate is not None)
    return (
        attack_title(attack),
        *(
            plus_minus(spread(s[name] for s in values if s[name] is not None))
            for name in ("paper_index", "paper_index_low")
        ),
        ", ".join(f"{count} {verdict}" for verdict, count in counts if count),
        f"{sum(right)} of {len(right)}" if right else ABSENT,
        percent(asr and asr.mean),
        str(len(scans)),
    )
