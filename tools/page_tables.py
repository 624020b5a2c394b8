"""What was measured, as tables for the pages of attacks and defences: rows picked from records."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from wm_eval.artefact_section import filter_table
from wm_eval.attacks.gather import CLEAN, AttackRecords, read_study
from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import counted
from wm_eval.attacks.tables import table1, table2
from wm_eval.cleaning.gather import about, read_cleaning
from wm_eval.cleaning.tables import cleaning_page
from wm_eval.defence_sections import CLEANINGS, DETECTS, INDICES, POPULATION
from wm_eval.detectors import CALIBRATED, DETECTORS
from wm_eval.paper2.index_figure import index_page
from wm_eval.paper2.tables import pages as detect_pages
from wm_eval.population.config import EVERYWHERE
from wm_eval.population.summary import read_scans, summarise
from wm_eval.population.tables import population_tables
from wm_eval.records import read_records
from wm_eval.tables import ABSENT, Table

_DATA = {"attacks-cifar10": "CIFAR-10", "attacks-mnist": "MNIST"}
_RATES = {"cda": "CDA, %", "asr": "ASR, %", "ftr": "false triggers, %"}
_RECIPES = {"plain": "", "corrupted": ", victims trained under corruptions"}
_CHOSEN_ON = ("cleaning-cifar10-first",)  # studies of victims that settings were chosen on
_WORLDS = " World: the models' data and network, with residual connections or without."
_SCANNED = (
    "Index: the paper's, over all labels; above 2 its rule says backdoored. Verdicts of {ours} are "
    "those of the calibrated rule; the others' come from rules of their own, which state no error "
    "rate. Named right: the verdict names the target. {about}"
)


def pick(tables: Iterable[Table], column: str, wanted: Collection[str]) -> list[Table]:
    """The rows of tables where a column says one of these things, without that column if alone."""
    found = []
    for table in tables:
        if column not in table.headers:
            continue
        place = table.headers.index(column)
        rows = [row for row in table.rows if row[place] in wanted]
        if not rows:
            continue
        kept = [n for n in range(len(table.headers)) if n != place or len({r[n] for r in rows}) > 1]
        headers = tuple(table.headers[n] for n in kept)
        cut = tuple(tuple(row[n] for n in kept) for row in rows)
        found.append(table._replace(headers=headers, rows=cut))
    return found


def attack_tables(results: Path) -> Iterator[Table]:
    """Tables that have a column for the attack, with the data in their titles."""
    for name in _DATA:
        study = read_study(results / name)
        for recipe, told in _RECIPES.items():
            if study.started(recipe):
                note = _rates_note(study, recipe)
                for table in table1(study, recipe).tables[:3]:
                    title = f"{table.title}: {_DATA[name]}{told}"
                    yield table._replace(title=title, note=note)
        stealth = table2(study).tables[0]
        yield stealth._replace(title=f"{stealth.title}: {_DATA[name]}")
    populations = population_tables(summarise(read_scans(results / POPULATION)))
    crosses = next(table for table in populations if table.name == "cross")
    yield _with_models(crosses, next(table for table in populations if table.name == "backdoored"))
    pages = {name: index_page(results / name) for name in INDICES}
    headers = ("detector", *pages[INDICES[0]].tables[0].headers)
    rows = tuple(
        (_scanner(name), *row) for name, page in pages.items() for row in page.tables[0].rows
    )
    ours = " and ".join(DETECTORS[name].title for name in CALIBRATED)
    note = _SCANNED.format(ours=ours, about=_defender(pages[INDICES[0]]))
    yield Table("scans", "One victim on CIFAR-10, scanned", headers, rows, note)


def _rates_note(study: AttackRecords, recipe: str) -> str:
    """What the three rates of a study are, and over how many images and victims."""
    cells = [
        study.cells[run]["corruptions"]["none"]
        for run in study.cells
        if run.recipe == recipe and run.attack != CLEAN
    ]
    clean, triggered = (counted(c[key] for c in cells) for key in ("n_clean", "n_attack"))
    seeds = ", ".join(map(str, study.seeds(recipe)))
    return (
        "CDA: clean test images that are classified right, after the corruption. ASR: images of "
        "other classes than the target that get its label with the trigger in them. False "
        f"triggers: the same without it.\n\nOver {clean} test images, {triggered} of them of other "
        f"classes; victims of {study.data['n_train']} training images, seed {seeds}."
    )


def _defender(page: Page) -> str:
    """How many clean images a scan had."""
    return page.about.partition("; ")[2].capitalize()


def _with_models(crosses: Table, backdoored: Table) -> Table:
    """The table of attacks by detectors, with the models that stand behind each row."""
    worlds: dict[str, dict[str, str]] = {}
    for row in backdoored.rows:
        cells = dict(zip(backdoored.headers, row, strict=True))
        if cells["world"] != EVERYWHERE:
            worlds.setdefault(cells["attack"], {})[cells["world"]] = cells["judged"]
    rows = tuple(
        (row[0], ", ".join(f"{w} {n}" for w, n in worlds.get(row[0], {}).items()), *row[1:])
        for row in crosses.rows
    )
    note = (
        "Models whose true target was named, with exact 95 % intervals. Models: their data and "
        "network, with residual connections or without, and how many of those that were trained "
        "have an attack success of 90 % or more and are judged."
    )
    title = "Found by the defences, on many small models"
    headers = (crosses.headers[0], "models", *crosses.headers[1:])
    return crosses._replace(title=title, headers=headers, rows=rows, note=note)


def of_attack(measured: Iterable[Table], title: str) -> list[Table]:
    """What was measured of one attack; the three rates of a study side by side."""
    mine = [table for table in pick(measured, "attack", {title}) if _says_something(table)]
    rates = [table for table in mine if "source" in table.headers]
    others = [table for table in mine if "source" not in table.headers]
    groups: dict[str, list[Table]] = {}
    for table in rates:
        groups.setdefault(table.title.partition(": ")[2], []).append(table)
    return [*(_side_by_side(title, group) for title, group in groups.items()), *others]


def _says_something(table: Table) -> bool:
    skipped = {"source", "seeds", "attack"}
    kept = [n for n, header in enumerate(table.headers) if header not in skipped]
    ours = [r for r in table.rows if "source" not in table.headers or "measured" in r]
    return any(row[n] != ABSENT for row in ours for n in kept)


def _side_by_side(where: str, group: Sequence[Table]) -> Table:
    """Three tables of one row, or of two with the paper's, as columns of one, by corruption."""
    columns: dict[str, Mapping[str, str]] = {}
    for table in group:
        measure = _RATES[table.name.rpartition("-")[2]]
        for row in table.rows:
            cells = dict(zip(table.headers, row, strict=True))
            source = cells.pop("source")
            cells.pop("seeds")
            columns[measure if source == "measured" else f"{measure}, paper"] = cells
    corruptions = next(iter(columns.values()))
    rows = tuple((c, *(column[c] for column in columns.values())) for c in corruptions)
    note = group[0].note
    if any(name.endswith(", paper") for name in columns):
        note += "\n\nThe paper has one mask and one noise: its figure stands under both readings."
    return Table("rates", f"Rates: {where}", ("corruption", *columns), rows, note)


def filters_table(folder: Path) -> Table:
    """What the filters made from reversed triggers let through, and over how many images."""
    records = read_records(folder)
    judged = records["filters"].values["filters"]
    clean, triggered = (counted(row[key] for row in judged) for key in ("n_clean", "n_poisoned"))
    table = filter_table(records)
    return table._replace(
        title=f"{table.title}: CIFAR-10, one victim of the watermark",
        note=f"{table.note} False alarms: of {clean} clean ones. Hits: of {triggered} with the "
        "true trigger. With 95 % intervals.",
    )


def detector_tables(results: Path) -> Iterator[Table]:
    """Tables that have a column for the detector: the population, and the detection experiments."""
    for table in population_tables(summarise(read_scans(results / POPULATION))):
        world = _WORLDS if "world" in table.headers else ""
        yield table._replace(note=table.note + world)
    for name in DETECTS:
        for page in detect_pages(results / name):
            yield from page.tables


def crosses_of(tables: Iterable[Table], title: str) -> list[Table]:
    """The column of one detector in the table of attacks by detectors."""
    found = []
    for table in tables:
        if table.name == "cross" and title in table.headers:
            kept = [table.headers.index(name) for name in ("attack", "lowest ASR", title)]
            headers = ("attack", "lowest ASR", "target named")
            rows = tuple(tuple(row[n] for n in kept) for row in table.rows)
            found.append(
                table._replace(headers=headers, rows=rows, title="By attack, on many small models")
            )
    return found


def _scanner(folder: str) -> str:
    name = folder.removeprefix("figure3-cifar10").lstrip("-") or "nc"
    return DETECTORS[name].title


def index_tables(results: Path, name: str) -> list[Table]:
    """What one detector said of the one victim of each attack."""
    wanted = DETECTORS[name].title
    pages = [index_page(results / folder) for folder in INDICES if _scanner(folder) == wanted]
    title = "One victim of each attack, CIFAR-10"
    return [
        page.tables[0]._replace(title=title, note=f"{page.tables[0].note} {_defender(page)}")
        for page in pages
    ]


def cleaning_tables(results: Path) -> Iterator[Table]:
    """Tables that have a column for the method of cleaning, with the data in their titles."""
    for name, (title, _) in CLEANINGS.items():
        study = read_cleaning(results / name)
        data = about(study).partition(", ")[2]
        data += " Settings were chosen on these victims." if name in _CHOSEN_ON else ""
        for table in cleaning_page(study).tables:
            if table.name in ("cleaning", "cleaning-clean"):
                note = f"{data}\n\n{table.note}"
                yield table._replace(title=f"{title}: {table.title.lower()}", note=note)
