"""What was measured of one attack, detector or mitigation, as tables for its page in docs/."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

from tools.render_results import (
    ATTACKS,
    DETECTIONS,
    FULL,
    INDICES,
    MITIGATIONS,
    population_page,
    recorded,
)
from tools.result_tables import filter_table

from wm_eval.numbers import AVERAGES, keys, select, spread
from wm_eval.pages.attacks import COLUMNS, TRAINED, about, started, table1, table2
from wm_eval.pages.detection import detection_page, index_page
from wm_eval.pages.mitigation import mitigation_page, paper_page
from wm_eval.population import ALL_SETTINGS
from wm_eval.records import StudyRecords, read_study
from wm_eval.render import ABSENT, Page, Table, count_range, plus_minus, with_interval
from wm_eval.titles import CLEAN, PAPERS, attack_title, detector_title

_DATA = {
    "attacks-cifar10": "CIFAR-10",
    "bpp-cifar10": "CIFAR-10, on another machine",
    "attacks-mnist": "MNIST",
    "p1-cifar10": "CIFAR-10, all images, airbench",
    "p1-gtsrb": "GTSRB, airbench",
    "p1-imagenet10": "ten ImageNet classes, airbench",
    "p1-imagenet10-224": "ten ImageNet classes, EfficientNet-Lite0",
    "marks-cifar10": "CIFAR-10, all images, airbench at half its width",
    "pairs-cifar10": "CIFAR-10, all images, airbench at half its width, other label maps",
}
_POPULATIONS = {
    "population-audit": "networks of many kinds",
    "population-pairs": "all-to-all and source-specific",
    "population-adaptive": "an attacker who knows the detectors",
    "population-attacks": "every attack",
}
_MEASURES = {"cda": "CDA, %", "asr": "ASR, %", "ftr": "false triggers, %"}
_SETTINGS = " Setting: the models' data and network, with residual connections or without."


@cache
def study_of(folder: Path) -> StudyRecords:
    """A study that is read once."""
    return read_study(folder)


def attack_tables(results: Path, attack: str) -> list[Table]:
    """Rates and stealth in every study, and what the detectors say of it."""
    tables = []
    for name in (*ATTACKS, *recorded(results, FULL)):
        study = study_of(results / name)
        for corruptions in TRAINED:
            if started(study, corruptions):
                tables += _rates(study, corruptions, attack, _DATA[name])
        stealth = table2(study).tables[0]
        stealth = stealth._replace(title=f"{stealth.title}: {_DATA[name]}")
        tables += [t for t in pick([stealth], "attack", {attack_title(attack)}) if _measured(t)]
    tables += pick(
        [_named_models(population_page(results / "population"))], "attack", _title(attack)
    )
    return [*tables, *pick([_scans(results)], "attack", _title(attack))]


def detector_tables(results: Path, name: str) -> list[Table]:
    """Error rates in the population, the papers' experiments, one victim of each attack."""
    title, tables = detector_title(name), population_page(results / "population").tables
    cross = next(table for table in tables if table.name == "cross")
    picked = []
    if title in cross.headers:  # it was calibrated on these models
        indices = [cross.headers.index(column) for column in ("attack", "lowest ASR", title)]
        rows = tuple(tuple(row[i] for i in indices) for row in cross.rows)
        headers = ("attack", "lowest ASR", "target named")
        by_attack = "By attack, on many small models"
        picked = [cross._replace(title=by_attack, headers=headers, rows=rows)]
    for table in tables:
        note = table.note + (_SETTINGS if "setting" in table.headers else "")
        picked += pick([table._replace(note=note)], "detector", {title})
    for study_name, what in _POPULATIONS.items():
        for table in population_page(results / study_name).tables:
            named = table._replace(title=f"{table.title}, {what}")
            if {"detector", "setting"} <= set(named.headers):
                picked += pick(pick([named], "detector", {title}), "setting", {ALL_SETTINGS})
    for experiment in recorded(results, DETECTIONS):
        page = detection_page(study_of(results / experiment))
        picked += pick(page.tables, "detector", {title})
    for folder in ("attacks-cifar10", *recorded(results, FULL)):
        study = study_of(results / folder)
        if study.select(kind="scan", detector=name):
            page = index_page(study, name)
            note = f"{page.tables[0].note} {_defender(page)}"
            data = _DATA[folder]
            picked.append(page.tables[0]._replace(title=f"Victims of attacks, {data}", note=note))
    return picked


def mitigation_tables(results: Path, titles: Collection[str]) -> Iterator[Table]:
    """The rows of some methods in every study of mitigations."""
    for name, (title, _) in MITIGATIONS.items():
        study = study_of(results / name)
        data = about(study, keys(study, "mitigation", "seed")).partition(", ")[2]
        for table in mitigation_page(study).tables:
            if table.name in (
                "mitigation-across",
                "mitigation",
                "mitigation-clean",
                "mitigation-reactivation",
            ):
                heading = f"{title}: {table.title.lower()}"
                named = table._replace(title=heading, note=f"{data}\n\n{table.note}")
                yield from pick([named], "method", titles)
    page = paper_page(study_of(results / "detection-mnist"))
    yield from pick([page.tables[0]._replace(title=page.title)], "method", titles)


def filters_table(results: Path) -> Table:
    """What the filters made from reversed triggers let through, and over how many images."""
    study = study_of(results / "artefacts-cifar10")
    filters = study.select(kind="filters")[0].values["filters"]
    clean, bad = (count_range(row[key] for row in filters) for key in ("n_clean", "n_poisoned"))
    table = filter_table(study)
    return table._replace(
        title=f"{table.title}: CIFAR-10, one victim of the watermark",
        note=f"{table.note} False alarms: of {clean} clean ones. Hits: of {bad} with the true "
        "trigger. With 95 % intervals.",
    )


def blind_filters(results: Path, name: str) -> list[Table]:
    """What a filter that needs no scan catches of each attack; nothing if it was not measured."""
    rows = []
    for record in study_of(results / "artefacts-cifar10").select(kind="filter", filter=name):
        v = record.values
        alarms, hits = (
            with_interval(v[kind] / v[count], v[f"{kind}_interval"])
            for kind, count in (("false_alarms", "n_clean"), ("hits", "n_triggered"))
        )
        where = (attack_title(str(record.key["attack"])), f"`{record.key['study']}`")
        rows.append((*where, alarms, hits, f"{v['auroc']:.3f}"))
    headers = ("attack", "victim of", "false alarms", "hits", "AUROC")
    note = (
        "A thousand test images choose the threshold, for a rate of 5 %; the next 2,000 are "
        "judged, as they are and, those of other classes than the target, with the trigger, also "
        "where it does not work. With 95 % intervals. `python tools/measure_filters.py` makes it."
    )
    return [Table("filter", "Images with a trigger", headers, tuple(rows), note)] if rows else []


def pick(tables: Iterable[Table], column: str, wanted: Collection[str]) -> list[Table]:
    """The rows where a column has one of these values, without that column if it has but one."""
    picked = []
    for table in tables:
        if column not in table.headers:
            continue
        index = table.headers.index(column)
        rows = [row for row in table.rows if row[index] in wanted]
        if not rows:
            continue
        several = len({row[index] for row in rows}) > 1
        columns = [i for i in range(len(table.headers)) if several or i != index]
        headers = tuple(table.headers[i] for i in columns)
        cells = tuple(tuple(row[i] for i in columns) for row in rows)
        picked.append(table._replace(headers=headers, rows=cells))
    return picked


def joined(tables: Iterable[Table]) -> list[Table]:
    """Tables of one title, with the same columns and the same note, as one."""
    whole: dict[tuple[object, ...], Table] = {}
    for table in tables:
        key = (table.title, table.headers, table.note)
        before = whole.get(key)
        whole[key] = table if before is None else before._replace(rows=before.rows + table.rows)
    return list(whole.values())


def without_repeats(tables: Iterable[Table]) -> Iterator[Table]:
    """Tables with each paragraph of their notes under the first that has it."""
    seen: set[str] = set()
    for table in tables:
        paragraphs = table.note.split("\n\n")
        yield table._replace(note="\n\n".join(p for p in paragraphs if p not in seen))
        seen.update(paragraphs)


def _rates(study: StudyRecords, corruptions: str, attack: str, data: str) -> list[Table]:
    """Corruptions by measures, with the paper's columns beside ours; nothing if not measured."""
    numbers = [n for n in table1(study, corruptions).numbers if n.key["attack"] == attack]
    if not any(n.source == "measured" for n in numbers):
        return []
    columns = {
        (measure, source): title + ("" if source == "measured" else ", paper")
        for measure, title in _MEASURES.items()
        for source in ("measured", "paper")
        if any((n.measure, n.source) == (measure, source) for n in numbers)
    }
    titles = [title for title, _ in COLUMNS.values()]
    titles += ["AVG pixel, gaussian", "AVG block, salt-pepper"]
    rows = []
    for corruption, title in zip((*COLUMNS, *AVERAGES), titles, strict=True):
        spreads = [
            spread(select(numbers, measure, source=source, corruption=corruption))
            for measure, source in columns
        ]
        rows.append((title, *(plus_minus(s, factor=100, digits=1) for s in spreads)))
    note = _rates_note(study, corruptions)
    if any(source == "paper" for _, source in columns):
        note += "\n\nThe paper has one mask and one noise: its figure stands under both readings."
    trained = "" if corruptions == "plain" else ", victims trained under corruptions"
    headers = ("corruption", *columns.values())
    return [Table("rates", f"Rates: {data}{trained}", headers, tuple(rows), note)]


def _rates_note(study: StudyRecords, corruptions: str) -> str:
    """What the three rates are, and over how many images and victims."""
    records = study.select(kind="rates", corruptions=corruptions)
    none = [r.values["corruptions"]["none"] for r in records if r.key["attack"] != CLEAN]
    clean, triggered = (count_range(m[key] for m in none) for key in ("n_clean", "n_attack"))
    seeds = ", ".join(str(seed) for seed in sorted({r.key["seed"] for r in records}))
    trained = study.select(kind="images")[0].values["n_train"]
    return (
        "CDA: clean test images that are classified right, after the corruption. ASR: images of "
        "other classes than the target that get its label with the trigger in them. False "
        f"triggers: the same without it.\n\nOver {clean} test images, {triggered} of them of other "
        f"classes; victims of {trained} training images, seed {seeds}."
    )


def _named_models(page: Page) -> Table:
    """The table of attacks by detectors, with the models behind each row."""
    by_name = {table.name: table for table in page.tables}
    cross, backdoored = by_name["cross"], by_name["backdoored"]
    models: dict[str, dict[str, str]] = {}
    for row in backdoored.rows:
        cells = dict(zip(backdoored.headers, row, strict=True))
        if cells["setting"] != ALL_SETTINGS:
            models.setdefault(cells["attack"], {})[cells["setting"]] = cells["judged"]
    rows = tuple(
        (row[0], ", ".join(f"{s} {n}" for s, n in models.get(row[0], {}).items()), *row[1:])
        for row in cross.rows
    )
    note = (
        "Models whose true target was named, with exact 95 % intervals. Models: their data and "
        "network, with residual connections or without, and how many of those that were trained "
        "have an attack success of 90 % or more and are judged."
    )
    title = "Found by the defences, on many small models"
    headers = (cross.headers[0], "models", *cross.headers[1:])
    return cross._replace(title=title, headers=headers, rows=rows, note=note)


def _scans(results: Path) -> Table:
    """Every detector's scans of one victim of each attack."""
    study = study_of(results / "attacks-cifar10")
    pages = {name: index_page(study, name) for name in INDICES}
    rows = tuple(
        (detector_title(name), *row) for name, page in pages.items() for row in page.tables[0].rows
    )
    ours = " and ".join(map(detector_title, PAPERS))
    note = (
        "Index: the paper's, over all labels; above 2 its rule says backdoored. Verdicts of "
        f"{ours} are those of the calibrated rule; the others' come from rules of their own, which "
        "state no error rate. Named right: the verdict names the target. "
        f"{_defender(pages[INDICES[0]])}"
    )
    headers = ("detector", *pages[INDICES[0]].tables[0].headers)
    return Table("scans", "One victim on CIFAR-10, scanned", headers, rows, note)


def _defender(page: Page) -> str:
    """How many clean images a scan had."""
    return page.about.partition("; ")[2].capitalize()


def _title(attack: str) -> set[str]:
    return {attack_title(attack)}


def _measured(table: Table) -> bool:
    """Whether any cell beside the count of seeds holds a measured number."""
    skipped = {"attack", "seeds"}
    ours = [
        i
        for i, header in enumerate(table.headers)
        if header not in skipped and not header.endswith(", paper")
    ]
    return any(row[i] != ABSENT for row in table.rows for i in ours)
