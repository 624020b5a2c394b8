"""Tables of a made-up study of attacks. No figure in it was measured."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wm_eval.attacks.config import CLEAN, TABLE
from wm_eval.attacks.gather import TITLES, read_failures, read_study
from wm_eval.attacks.learning import learning
from wm_eval.attacks.paper import PAPER_COLUMNS, PAPER_TABLE1, PAPER_TABLE2
from wm_eval.attacks.render import html_page, latex, markdown, tidy_csv
from wm_eval.attacks.spread import counted, plus_minus
from wm_eval.attacks.tables import COLUMNS, table1, table2, write_tables
from wm_eval.records import Record, write_record, write_text
from wm_eval.tables import Table

NONE, PIXEL, BLOCK, ROTATION, GAUSS, PEPPER, SCALE = COLUMNS
BASELINES = [name for name in TITLES if name not in ("input-aware", "equation2", "clean")]


class Study:
    """Writes records in the format of the runner."""

    def __init__(self, folder: Path, name: str = "cifar10", **data: Any) -> None:
        self.folder = folder
        values = {"name": name, "n_train": 20_000, "n_test": 10_000, "n_measured": 2000}
        self.write("data", values | data)

    def write(self, name: str, values: dict, seed: int = 0, data: str = "abc") -> None:
        record = Record(name, {"settings": {}}, seed, data, {**values, "files": {}})
        write_record(self.folder / "records" / f"{name}.json", record, environment={"seconds": 1})

    def cell(
        self,
        attack: str,
        seed: int = 0,
        recipe: str = "plain",
        *,
        rates: Callable[[str, str], float] | None = None,
        columns: tuple[str, ...] = tuple(COLUMNS),
        gap: float = -0.01,
    ) -> None:
        find = rates or (lambda column, measure: {"cda": 0.9, "asr": 0.95, "ftr": 0.01}[measure])
        found = {c: {m: find(c, m) for m in ("cda", "asr", "ftr")} for c in columns}
        values = {
            "attack": attack,
            "recipe": recipe,
            "corruptions": found,
            "cda_gap": {"value": gap, "low": gap - 0.01, "high": gap + 0.01, "n": 2000},
        }
        self.write(f"cell-{recipe}-{attack}-{seed}", values, seed)

    def victim(
        self,
        attack: str,
        seed: int = 0,
        recipe: str = "plain",
        *,
        epoch: int | None = 2,
        **more: Any,
    ) -> None:
        watched = [{"cda": 0.8, "asr": 0.5, "poison_loss": loss} for loss in (2.3, 0.5, 0.125)]
        values = {
            "attack": attack,
            "recipe": recipe,
            "history": {"losses": [2.0, 1.0, 0.5], "accuracies": [0.5] * 3, "watched": watched},
            "steps": 471,
            "poisoned": 2000,
            "poisoned_of_target": None,
            "learned": epoch and {"epoch": epoch, "exposures": 2000 * epoch},
        }
        self.write(f"victim-{recipe}-{attack}-{seed}", values | more, seed)

    def stealth(self, attack: str, seed: int = 0, *, lpips: float | None = 0.1) -> None:
        found: dict[str, Any] = {
            name: {"mean": mean + seed / 100, "p05": 0.0, "p95": 1.0}
            for name, mean in (("psnr", 27.4), ("ssim", 0.99), ("linf", 0.5))
        }
        found["lpips"] = lpips and {"mean": lpips, "p05": 0.0, "p95": 1.0}
        if lpips is None:
            found["lpips_absent"] = "no weights <here>"
        self.write(
            f"stealth-{attack}-{seed}", {"attack": attack, "n": 1000, "stealth": found}, seed
        )

    def failure(self, stage: str, attack: str, recipe: str | None, seed: int, reason: str) -> None:
        found = {"stage": stage, "attack": attack, "recipe": recipe, "seed": seed, "reason": reason}
        write_text(self.folder / "failures" / f"{stage}.json", json.dumps(found))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


def table(tables: tuple[Table, ...], name: str) -> Table:
    return next(t for t in tables if t.name == name)


def row(found: Table, *first: str) -> dict[str, str]:
    cells = next(cells for cells in found.rows if cells[: len(first)] == first)
    return dict(zip(found.headers, cells, strict=True))


def has(tables: tuple[Table, ...], name: str) -> bool:
    return any(t.name == name for t in tables)


# What the paper prints.


def test_the_papers_averages_are_the_means_of_its_five_columns_none_included() -> None:
    rows = [
        (data, attack, measure, found)
        for data, attacks in PAPER_TABLE1.items()
        for attack, measures in attacks.items()
        for measure, found in measures.items()
    ]
    assert len(rows) == 3 * 11 * 2
    assert PAPER_COLUMNS[0] == "None"
    # All 66 hold: the average is rounded to one digit, so it may be off by half of one.
    wrong = [r[:3] for r in rows if abs(sum(r[3].columns) / 5 - r[3].average) > 0.05 + 1e-9]
    assert wrong == []
    # Without the column None, most would not.
    short = [r[:3] for r in rows if abs(sum(r[3].columns[1:]) / 4 - r[3].average) <= 0.05 + 1e-9]
    assert len(short) < 20


def test_the_papers_figures_are_those_that_it_prints() -> None:
    assert list(PAPER_TABLE1) == ["cifar10", "gtsrb", "imagenet10"]
    assert all(list(attacks) == BASELINES for attacks in PAPER_TABLE1.values())
    spy = PAPER_TABLE1["cifar10"]["watermark"]
    assert spy["cda"] == ((94.7, 51.6, 93.0, 94.4, 94.2), 85.6)
    assert spy["asr"] == ((100.0, 34.1, 100.0, 99.9, 100.0), 86.8)
    assert PAPER_TABLE1["gtsrb"]["wanet"]["asr"].columns == (98.1, 1.3, 88.8, 93.1, 96.7)
    assert PAPER_TABLE1["imagenet10"]["badnets"]["asr"].average == 49.6
    assert list(PAPER_TABLE2) == BASELINES
    assert PAPER_TABLE2["badnets"] == (27.23, 0.992, 0.104)
    assert PAPER_TABLE2["watermark"] == (38.73, 0.995, 0.001)
    # The text says by how much the watermark is ahead of FTrojan.
    ahead = [a - b for a, b in zip(PAPER_TABLE2["watermark"], PAPER_TABLE2["ftrojan"], strict=True)]
    assert ahead == pytest.approx([4.95, 0.033, -0.109])


def test_every_attack_of_the_runner_has_a_title_in_its_order() -> None:
    assert tuple(TITLES) == (*TABLE, CLEAN)


# Table 1.


def test_means_spreads_and_averages_are_those_of_a_hand_computed_study(study: Study) -> None:
    base = dict(zip(COLUMNS, (0.90, 0.50, 0.40, 0.70, 0.80, 0.30, 0.60), strict=True))
    for seed in (0, 1, 2):
        study.cell("badnets", seed, rates=lambda c, m, s=seed: base[c] + 0.01 * s)
    found = table(table1(read_study(study.folder)).tables, "table1-cda")
    ours = row(found, "BadNets", "measured")
    # Mean of 90, 91 and 92 is 91, their sample standard deviation 1.
    assert ours["None"] == "91.0 ± 1.0" and ours["Noise salt-pepper"] == "31.0 ± 1.0"
    # (90 + 50 + 70 + 80 + 60) / 5 = 70 and (90 + 40 + 70 + 30 + 60) / 5 = 58, a point more a seed.
    assert ours["AVG pixel, gaussian"] == "71.0 ± 1.0"
    assert ours["AVG block, salt-pepper"] == "59.0 ± 1.0"
    assert ours["seeds"] == "3"
    assert found.headers[2:9] == (
        "None",
        "RM pixel",
        "RM block",
        "Rotation",
        "Noise gaussian",
        "Noise salt-pepper",
        "Re-scale",
    )


def test_the_spread_of_an_average_is_that_of_the_averages(study: Study) -> None:
    """Columns that swing against each other leave their average still."""
    study.cell("lf", 0, rates=lambda c, m: {NONE: 0.8, PIXEL: 0.6}.get(c, 0.5))
    study.cell("lf", 1, rates=lambda c, m: {NONE: 0.6, PIXEL: 0.8}.get(c, 0.5))
    ours = row(table(table1(read_study(study.folder)).tables, "table1-asr"), "LF", "measured")
    assert ours["None"] == "70.0 ± 14.1" and ours["AVG pixel, gaussian"] == "58.0 ± 0.0"


def test_one_seed_has_no_spread_and_says_so(study: Study) -> None:
    study.cell("sig", rates=lambda c, m: 0.12345)
    page = table1(read_study(study.folder))
    ours = row(table(page.tables, "table1-ftr"), "SIG", "measured")
    assert ours["None"] == "12.3" and ours["seeds"] == "1"
    assert "Seed 0: one, so there is no spread." in page.about
    assert "rates over 2000 test images" in page.about


def test_the_papers_row_stands_below_ours_under_both_readings(study: Study) -> None:
    study.cell("ssba")
    page = table1(read_study(study.folder))
    found = table(page.tables, "table1-asr")
    paper = row(found, "SSBA", "paper")
    assert paper["None"] == "98.6" and paper["Re-scale"] == "67.5" and paper["seeds"] == "–"
    assert paper["RM pixel"] == paper["RM block"] == "99.0"
    assert paper["AVG pixel, gaussian"] == paper["AVG block, salt-pepper"] == "84.8"
    assert sum(cells[1] == "paper" for cells in found.rows) == 11
    assert not any(c[1] == "paper" for c in table(page.tables, "table1-ftr").rows)


@pytest.mark.parametrize(("data", "none"), [("gtsrb", "100.0"), ("imagenet10", "93.2")])
def test_each_data_set_of_the_paper_has_its_own_figures(
    tmp_path: Path, data: str, none: str
) -> None:
    study = Study(tmp_path, data)
    study.cell("watermark")
    tables = table1(read_study(study.folder)).tables
    assert row(table(tables, "table1-cda"), "Spy-Watermark", "paper")["None"] == none


def test_other_data_sets_have_no_figures_of_the_paper(tmp_path: Path) -> None:
    study = Study(tmp_path, "mnist")
    study.cell("wanet")
    study.stealth("wanet")
    whole = read_study(study.folder)
    page = table1(whole)
    assert all(n.source == "measured" for n in (*page.numbers, *table2(whole).numbers))
    assert row(table(page.tables, "table1-cda"), "WaNet", "measured")["None"] == "90.0"
    assert row(table(table2(whole).tables, "table2-stealth"), "WaNet")["SSIM, paper"] == "–"


def test_rows_that_the_paper_does_not_have_are_marked(study: Study) -> None:
    for attack in ("input-aware", "equation2", "clean"):
        study.cell(attack)
    tables = table1(read_study(study.folder)).tables
    names = [cells[0] for cells in table(tables, "table1-cda").rows]
    assert names[-3:] == [
        "Spy-Watermark",
        "Plain blend, equation 2 (not in the paper)",
        "No attack (clean victim)",
    ]
    assert names.index("Input-aware (not in the paper)") == names.index("Spy-Watermark") - 1


def test_a_clean_victim_has_accuracy_and_false_triggers_but_no_attack_success(study: Study) -> None:
    study.cell("clean")
    page = table1(read_study(study.folder))
    assert row(table(page.tables, "table1-cda"), "No attack (clean victim)")["None"] == "90.0"
    assert row(table(page.tables, "table1-ftr"), "No attack (clean victim)")["None"] == "1.0"
    names = [cells[0] for cells in table(page.tables, "table1-asr").rows]
    assert "No attack (clean victim)" not in names
    assert not any((n.attack, n.measure) == ("clean", "asr") for n in page.numbers)


def test_an_average_needs_all_five_of_its_columns(study: Study) -> None:
    study.cell("blend", columns=(NONE, PIXEL, ROTATION, GAUSS, SCALE))
    tables = table1(read_study(study.folder)).tables
    ours = row(table(tables, "table1-cda"), "Blend", "measured")
    assert ours["AVG pixel, gaussian"] == "90.0"
    assert ours["RM block"] == ours["AVG block, salt-pepper"] == "–"
    lost = row(table(tables, "table1-missing"), "Blend")
    assert lost["missing"].startswith("cda mask-block, cda salt-pepper, asr mask-block")
    assert lost["reason"] == "not among the figures of its record"


def test_seeds_are_counted_row_by_row(study: Study) -> None:
    study.cell("blend", 0)
    study.cell("blend", 1, columns=(NONE,))
    ours = row(table(table1(read_study(study.folder)).tables, "table1-cda"), "Blend", "measured")
    assert ours["seeds"] == "1 to 2" and ours["None"] == "90.0 ± 0.0" and ours["RM pixel"] == "90.0"


def test_corrupted_training_is_a_table_of_its_own(study: Study) -> None:
    study.cell("badnets", rates=lambda c, m: 0.5)
    study.cell("badnets", 3, recipe="corrupted", rates=lambda c, m: 0.75)
    whole = read_study(study.folder)
    plain, corrupted = table1(whole), table1(whole, "corrupted")
    first, second = (
        row(table(page.tables, f"{page.name}-cda"), "BadNets", "measured")["None"]
        for page in (plain, corrupted)
    )
    assert (first, second) == ("50.0", "75.0")
    assert "Seed 0" in plain.about and "Seed 3" in corrupted.about
    assert [t.headers for t in plain.tables[:3]] == [t.headers for t in corrupted.tables[:3]]
    with pytest.raises(ValueError, match="expected a recipe in plain, corrupted, got 'half'"):
        table1(whole, "half")


# Coverage.


def test_coverage_counts_cells_and_names_every_reason(study: Study) -> None:
    for seed in (0, 1):
        for attack in TITLES:
            if attack not in ("ssba", "lf") and (attack, seed) != ("sig", 1):
                study.cell(attack, seed)
    study.failure("trigger-lf-0", "lf", None, 0, "no pattern fools it")
    study.failure("victim-plain-lf-0", "lf", "plain", 0, "trigger-lf-0 failed: no pattern fools it")
    study.failure("victim-corrupted-ssba-0", "ssba", "corrupted", 0, "of another recipe")
    tables = table1(read_study(study.folder)).tables
    # 13 attacks with three rates and a clean victim with two, under seven corruptions.
    total = (13 * 3 + 2) * 7
    lost = 2 * 3 * 7
    counts = table(tables, "table1-coverage").rows
    assert counts[0][1:] == (str(total - lost), str(total), f"{100 * (1 - lost / total):.1f} %")
    assert counts[1][1:3] == (str(2 * total - 5 * 21), str(2 * total))
    missing = table(tables, "table1-missing").rows
    assert missing == (
        ("SSBA", "0", "all 21 cells", "not run"),
        ("SSBA", "1", "all 21 cells", "not run"),
        ("SIG", "1", "all 21 cells", "not run"),
        ("LF", "0", "all 21 cells", "no pattern fools it"),
        ("LF", "1", "all 21 cells", "not run"),
    )


def test_a_full_table_says_so_and_lists_nothing(study: Study) -> None:
    for attack in TITLES:
        study.cell(attack)
    tables = table1(read_study(study.folder)).tables
    assert [r[3] for r in table(tables, "table1-coverage").rows] == ["100.0 %", "100.0 %"]
    assert not has(tables, "table1-missing")


def test_only_what_was_planned_is_missed(tmp_path: Path) -> None:
    planned = {"attacks": ["wanet", "marksman"], "seeds": [0, 1], "recipes": ["plain", "corrupted"]}
    study = Study(tmp_path, "mnist", planned=planned)
    study.cell("wanet")
    study.cell("clean")
    whole = read_study(study.folder)
    assert whole.attacks() == ["wanet", "marksman", "clean"]
    assert whole.seeds("plain") == [0, 1]
    # Nothing of the other recipe was tried yet: a table of dashes would tell nothing.
    assert {path.stem for path in write_tables(tmp_path)} == {"table1"}
    missing = table(table1(whole).tables, "table1-missing").rows
    assert [r[:2] for r in missing] == [
        ("WaNet", "1"),
        ("Marksman", "0"),
        ("Marksman", "1"),
        ("No attack (clean victim)", "1"),
    ]


def test_a_study_of_failures_alone_is_a_table_of_reasons(study: Study) -> None:
    study.failure("victim-plain-clean-0", "clean", "plain", 0, "no memory")
    study.failure("cell-plain-sig-0", "sig", "plain", 0, "victim-plain-clean-0 failed: no memory")
    tables = table1(read_study(study.folder)).tables
    assert row(table(tables, "table1-missing"), "SIG")["reason"].endswith("failed: no memory")
    assert row(table(tables, "table1-missing"), "No attack (clean victim)")["reason"] == "no memory"
    assert table(tables, "table1-coverage").rows[0][3] == "0.0 %"
    assert set(row(table(tables, "table1-cda"), "SIG", "measured").values()) == {
        "SIG",
        "measured",
        "–",
    }


# Table 2.


def test_stealth_stands_beside_the_papers(study: Study) -> None:
    study.stealth("badnets", 0)
    study.stealth("badnets", 1, lpips=None)
    study.stealth("equation2")
    page = table2(read_study(study.folder))
    found = row(table(page.tables, "table2-stealth"), "BadNets")
    assert list(found.values()) == [
        "BadNets",
        "27.41 ± 0.01",
        "27.23",
        "0.995 ± 0.007",
        "0.992",
        "0.100",
        "0.104",
        "1 to 2",
    ]
    missing = table(page.tables, "table2-missing")
    assert ("BadNets", "1", "lpips", "no weights <here>") in missing.rows
    assert row(missing, "Blend", "0")["missing"] == "all 3 cells"
    # 13 attacks, three measures; no clean victim.
    assert table(page.tables, "table2-coverage").rows[0][1:3] == ("6", "39")
    assert "over 1000 test images" in table(page.tables, "table2-stealth").note


def test_missing_stealth_is_explained_by_whatever_its_trigger_waited_for(study: Study) -> None:
    study.stealth("badnets")
    study.failure("victim-plain-input-aware-0", "input-aware", "plain", 0, "diverged")
    study.failure("trigger-ssba-0", "ssba", None, 0, "too few images")
    missing = table(table2(read_study(study.folder)).tables, "table2-missing")
    assert row(missing, TITLES["input-aware"])["reason"] == "diverged"
    assert row(missing, "SSBA")["reason"] == "too few images"


# Learning.


def test_learning_tells_steps_exposures_and_the_price(study: Study) -> None:
    for seed, gap in ((0, -0.01), (1, -0.02)):
        study.victim("badnets", seed, epoch=1 + seed)
        study.cell("badnets", seed, gap=gap)
        study.victim("clean", seed)
    page = learning(read_study(study.folder))
    found = row(table(page.tables, "learning-plain"), "BadNets")
    assert list(found.values()) == [
        "BadNets",
        "471",
        "2000",
        "2 of 2",
        "2000 to 4000",
        "95.0 ± 0.0",
        "-1.5 ± 0.7",
        "–",
        "2.30 to 0.12",
    ]
    assert len(table(page.tables, "learning-plain").rows) == 1
    assert not has(page.tables, "misses-plain")


def test_a_miss_has_a_line_with_all_that_is_known(study: Study) -> None:
    study.victim("sig", epoch=None, poisoned=1000, poisoned_of_target=0.5)
    study.cell("sig", rates=lambda c, m: 0.34, gap=-0.005)
    study.victim("marksman", epoch=3)
    study.cell("marksman", gap=-0.041)
    study.victim("lf", epoch=3)  # not measured: missing in Table 1, no miss here
    page = learning(read_study(study.folder))
    sig = row(table(page.tables, "learning-plain"), "SIG")
    assert sig["exposures until learned"] == "not learned" and sig["learned"] == "0 of 1"
    assert sig["share of the target class poisoned"] == "0.50"
    assert sig["CDA against clean (points)"] == "-0.5 (-1.5 to +0.5)"
    assert row(table(page.tables, "learning-plain"), "LF")["final ASR (%)"] == "–"
    assert table(page.tables, "misses-plain").rows == (
        (
            "SIG",
            "0",
            "ASR 34.0 %, below 90 %",
            "471 steps; at 90 % in no epoch; clean-label, 50.0 % of the target class poisoned; "
            "loss on poisoned images 2.30 to 0.12",
        ),
        (
            "Marksman",
            "0",
            "CDA -4.1 (-5.1 to -3.1) points against the clean victim",
            "471 steps; at 90 % in epoch 3, after 6000 exposures; loss on poisoned images 2.30 to "
            "0.12",
        ),
    )


@pytest.mark.parametrize(("asr", "gap", "missed"), [(0.9, -0.03, False), (0.8999, 0.0, True)])
def test_the_bounds_of_a_miss_are_part_of_what_is_allowed(
    study: Study, asr: float, gap: float, missed: bool
) -> None:
    study.victim("blend")
    study.cell("blend", rates=lambda c, m: asr, gap=gap)
    assert has(learning(read_study(study.folder)).tables, "misses-plain") is missed


def test_each_recipe_has_its_own_table_of_learning(study: Study) -> None:
    study.victim("blend", recipe="corrupted", history={"losses": [1.0], "watched": None})
    page = learning(read_study(study.folder))
    assert [t.name for t in page.tables] == ["learning-corrupted"]
    assert row(page.tables[0], "Blend")["loss on poisoned images"] == "–"


# The four forms.


class Reader(HTMLParser):
    """The cells of a page, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.loads += [v for k, v in attrs if k in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


NASTY = 'a <b>"x"</b> & 50 % of $y_1^2 {z} ~ #3 \\end | [c]\nnew line'


@pytest.fixture
def whole(study: Study) -> Study:
    for recipe in ("plain", "corrupted"):
        for seed in (0, 1):
            for attack in ("badnets", "clean"):
                study.cell(attack, seed, recipe, rates=lambda c, m: 1 / 3)
                study.victim(attack, seed, recipe)
    study.stealth("badnets")
    study.failure("victim-plain-wanet-0", "wanet", "plain", 0, NASTY)
    study.failure("stealth-wanet-0", "wanet", None, 0, NASTY)
    return study


def test_sixteen_files_are_written_and_the_same_records_give_the_same_bytes(whole: Study) -> None:
    paths = write_tables(whole.folder)
    names = {"table1", "table1-corrupted", "table2", "learning"}
    assert {p.name for p in paths} == {
        f"{n}.{e}" for n in names for e in ("md", "tex", "csv", "html")
    }
    assert {p for p in (whole.folder / "tables").iterdir()} == set(paths)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_tables(whole.folder)] == first


def test_a_table_that_nothing_was_tried_for_is_not_written(study: Study) -> None:
    study.cell("badnets")
    assert {p.stem for p in write_tables(study.folder)} == {"table1"}
    study.stealth("badnets")
    assert {p.stem for p in write_tables(study.folder)} == {"table1", "table2"}


def test_the_csv_has_a_row_for_every_number_in_full(whole: Study) -> None:
    page = table1(read_study(whole.folder))
    rows = list(csv.DictReader(io.StringIO(tidy_csv(page))))
    assert len(rows) == len(page.numbers)
    mine = [r for r in rows if r["attack"] == "badnets" and r["column"] == "none"]
    assert mine[0] == {
        "table": "table1",
        "data": "cifar10",
        "recipe": "plain",
        "attack": "badnets",
        "measure": "cda",
        "column": "none",
        "source": "measured",
        "seed": "0",
        "value": "0.333333333",
    }
    assert [(r["seed"], r["value"]) for r in mine if r["source"] == "paper"] == [
        ("", "0.915"),
        ("", "0.962"),
    ]


def test_a_name_with_commas_and_quotes_keeps_its_cell_in_the_csv(tmp_path: Path) -> None:
    study = Study(tmp_path, 'my "own", images')
    study.cell("badnets")
    rows = list(csv.DictReader(io.StringIO(tidy_csv(table1(read_study(study.folder))))))
    assert {r["data"] for r in rows} == {'my "own", images'}
    assert {len(r) for r in rows} == {9}


def test_latex_has_rules_of_booktabs_and_every_row_as_many_cells(whole: Study) -> None:
    found = read_study(whole.folder)
    for page in (table1(found), table2(found), learning(found)):
        text = latex(page)
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(page.tables)
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(page.tables)
        assert text.isascii()
        rows = [line for line in text.splitlines() if line.endswith(r" \\")]
        lengths = [len(t.headers) for t in page.tables for _ in range(1 + len(t.rows))]
        assert [len(re.split(r"(?<!\\)&", line)) for line in rows] == lengths
        assert len(set(re.findall(r"\\label{(.*)}", text))) == len(page.tables)


def test_latex_escapes_what_latex_would_read(whole: Study) -> None:
    text = latex(table1(read_study(whole.folder)))
    assert (
        r"a \textless{}b\textgreater{}\textquotedbl{}x\textquotedbl{}\textless{}/b\textgreater{} "
        r"\& 50 \% of \$y\_1\textasciicircum{}2 \{z\} \textasciitilde{} \#3 "
        r"\textbackslash{}end \textbar{} {[}c{]} new line \\"
    ) in text
    assert r"33.3 $\pm$ 0.0" in text
    # Columns of figures to the right, of sentences in lines of their own.
    assert (
        r"\begin{tabular}{llrrrrrrrrrr}" in text and r"\begin{tabular}{lrlp{0.3\linewidth}}" in text
    )


def test_the_page_escapes_loads_nothing_and_follows_the_light(whole: Study) -> None:
    found = read_study(whole.folder)
    for page in (table1(found), table2(found), learning(found)):
        text, reader = html_page(page), Reader()
        reader.feed(text)
        assert reader.open == [] and reader.loads == []
        assert "http" not in text and "<script" not in text and "@import" not in text
        assert '<html lang="en">' in text and "prefers-color-scheme: dark" in text
        expected = [list(cells) for t in page.tables for cells in (t.headers, *t.rows)]
        assert reader.rows == expected
    assert "<b>" not in html_page(table1(found))
    # A figure and its spread stay on one line.
    assert '<td class="short">33.3 ± 0.0</td>' in html_page(table1(found))
    assert html_page(table1(found)).count('<tr class="paper">') == 22


def test_markdown_keeps_a_reason_in_its_cell_and_its_tags_as_text(whole: Study) -> None:
    text = markdown(table1(read_study(whole.folder)))
    assert text.startswith("## Table 1: attacks under corruption\n\ncifar10: 20000 training images")
    line = next(
        line for line in text.splitlines() if "all 21 cells" in line and "&lt;b&gt;" in line
    )
    assert '"x"&lt;/b&gt; &amp; 50 %' in line and "\\| [c] new line |" in line
    for block in text.split("### ")[1:]:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


# What is refused.


def test_a_folder_without_records_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^expected records \(\*\.json\) in .*found none$"):
            write_tables(folder)
    assert not (tmp_path / "tables").exists()


def test_records_of_something_else_are_refused(tmp_path: Path) -> None:
    study = Study(tmp_path)
    with pytest.raises(ValueError, match=r"^expected records of attacks in .*, found none$"):
        write_tables(study.folder)
    study.cell("badnets")
    (tmp_path / "records" / "data.json").unlink()
    with pytest.raises(ValueError, match=r"^expected the record data\.json in .*, found none$"):
        write_tables(study.folder)


def test_records_of_two_data_sets_are_refused(study: Study) -> None:
    study.cell("badnets")
    study.write("trigger-badnets-0", {"attack": "badnets"}, data="other")
    with pytest.raises(ValueError, match="expected the records of one study, got 2 data sets"):
        read_study(study.folder)


def test_a_record_that_is_not_what_its_name_says_is_refused(study: Study) -> None:
    study.cell("badnets")
    path = study.folder / "records" / "cell-plain-badnets-0.json"
    path.rename(path.with_name("cell-plain-blend-0.json"))
    with pytest.raises(ValueError, match="expected a record named cell-plain-badnets-SEED, got"):
        read_study(study.folder)


@pytest.mark.parametrize(
    ("name", "values", "lacks"),
    [
        ("cell-plain-lf-0", {"attack": "lf", "recipe": "plain", "corruptions": {}}, "cda_gap"),
        ("victim-plain-lf-0", {"attack": "lf", "steps": 1, "poisoned": 1}, "recipe, history, lea"),
        ("stealth-lf-0", {}, "attack, n, stealth"),
        ("data", {"name": "cifar10"}, "n_train, n_test"),
    ],
)
def test_half_a_record_is_refused_by_name(
    study: Study, name: str, values: dict, lacks: str
) -> None:
    study.cell("badnets")
    study.write(name, values)
    with pytest.raises(ValueError, match=f"^expected {lacks}.* in the record {name}, found none$"):
        write_tables(study.folder)


@pytest.mark.parametrize("text", ["", "[]", '{"stage": "cell-plain-lf-0"}'])
def test_a_broken_failure_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "lf.json").write_text(text)
    with pytest.raises(ValueError, match=r"^expected stage, attack, .* in failures/lf\.json, got"):
        read_failures(tmp_path)
    assert read_failures(tmp_path / "nowhere") == []


def test_small_texts() -> None:
    assert plus_minus(None) == "–" and counted([]) == "–"
    assert counted([3, 3]) == "3" and counted([12, 3, 7]) == "3 to 12"
