"""Tables of a made-up study of attacks. No number in it was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from wm_eval import paper
from wm_eval.pages import study_pages
from wm_eval.pages.attacks import COLUMNS, attack_pages, learning, table1, table2
from wm_eval.records import Failure, Record, StudyRecords
from wm_eval.render import Page, Table
from wm_eval.titles import ATTACKS, attack_title

NONE, PIXEL, BLOCK, ROTATION, GAUSS, PEPPER, SCALE = COLUMNS
RATES = {"cda": 0.9, "asr": 0.95, "ftr": 0.01}


class Study:
    """Records of a study, in memory."""

    def __init__(self, data: str = "cifar10", planned: dict[str, Any] | None = None) -> None:
        self.entries: list[Record] = []
        self.failures: list[Failure] = []
        images = {"name": data, "n_train": 20_000, "n_test": 10_000, "n_measured": 2000}
        self.add("images", images)
        if planned:
            self.add("study", {"planned": planned}, study="made-up")

    def add(self, kind: str, values: dict[str, Any], **key: Any) -> None:
        self.entries.append(Record(kind, key, {}, {}, "abc", values, {}))

    def rates(
        self,
        attack: str,
        seed: int = 0,
        corruptions: str = "plain",
        *,
        find: Callable[[str, str], float] = lambda column, measure: RATES[measure],
        columns: tuple[str, ...] = tuple(COLUMNS),
        gap: float = -0.01,
    ) -> None:
        metrics = {c: {m: find(c, m) for m in RATES} for c in columns}
        difference = {"value": gap, "low": gap - 0.01, "high": gap + 0.01, "n": 2000}
        values = {"corruptions": metrics, "cda_gap": {"none": difference}}
        self.add("rates", values, attack=attack, corruptions=corruptions, seed=seed)

    def victim(
        self,
        attack: str,
        seed: int = 0,
        corruptions: str = "plain",
        *,
        epoch: int | None = 2,
        **more: Any,
    ) -> None:
        watched = [{"cda": 0.8, "asr": 0.5, "poison_loss": loss} for loss in (2.3, 0.5, 0.125)]
        values = {
            "history": {"losses": [2.0, 1.0, 0.5], "accuracies": [0.5] * 3, "watched": watched},
            "steps": 471,
            "poisoned": 2000,
            "poisoned_of_target": None,
            "learned": epoch and {"epoch": epoch, "exposures": 2000 * epoch},
        }
        self.add("victim", values | more, attack=attack, corruptions=corruptions, seed=seed)

    def stealth(self, attack: str, seed: int = 0, *, lpips: float | None = 0.1) -> None:
        values: dict[str, Any] = {
            name: {"mean": mean + seed / 100, "p05": 0.0, "p95": 1.0}
            for name, mean in (("psnr", 27.4), ("ssim", 0.99), ("linf", 0.5))
        }
        values["lpips"] = lpips and {"mean": lpips, "p05": 0.0, "p95": 1.0}
        if lpips is None:
            values["lpips_absent"] = "no weights"
        self.add("stealth", {"n": 1000, "stealth": values}, attack=attack, seed=seed)

    def fail(self, kind: str, reason: str, **key: Any) -> None:
        self.failures.append(Failure(kind, key, reason))

    @property
    def records(self) -> StudyRecords:
        return StudyRecords(tuple(self.entries), tuple(self.failures))


@pytest.fixture
def study() -> Study:
    return Study()


def table(page: Page, name: str) -> Table:
    return next(t for t in page.tables if t.name == name)


def row(table: Table, *first: str) -> dict[str, str]:
    cells = next(cells for cells in table.rows if cells[: len(first)] == first)
    return dict(zip(table.headers, cells, strict=True))


def test_the_papers_averages_are_the_means_of_all_five_columns() -> None:
    assert len(paper.RATES) == 3 * 11 * 2 and paper.COLUMNS[0] == "None"
    # An average is rounded to one digit, so it may be off by half of one.
    for name, rates in paper.RATES.items():
        assert sum(rates.columns) / 5 == pytest.approx(rates.average, abs=0.05 + 1e-9), name


def test_the_papers_numbers() -> None:
    spy = paper.RATES["cifar10", "watermark", "cda"], paper.RATES["cifar10", "watermark", "asr"]
    assert spy[0] == ((94.7, 51.6, 93.0, 94.4, 94.2), 85.6)
    assert spy[1] == ((100.0, 34.1, 100.0, 99.9, 100.0), 86.8)
    assert paper.RATES["gtsrb", "wanet", "asr"].columns == (98.1, 1.3, 88.8, 93.1, 96.7)
    assert paper.RATES["imagenet10", "badnets", "asr"].average == 49.6
    assert paper.STEALTH["badnets"] == (27.23, 0.992, 0.104)
    # The text says by how much the watermark is ahead of FTrojan.
    pair = zip(paper.STEALTH["watermark"], paper.STEALTH["ftrojan"], strict=True)
    assert [a - b for a, b in pair] == pytest.approx([4.95, 0.033, -0.109])


def test_means_spreads_and_averages_of_a_hand_computed_study(study: Study) -> None:
    base = dict(zip(COLUMNS, (0.90, 0.50, 0.40, 0.70, 0.80, 0.30, 0.60), strict=True))
    for seed in (0, 1, 2):
        study.rates("badnets", seed, find=lambda c, m, s=seed: base[c] + 0.01 * s)
    ours = row(table(table1(study.records), "table1-cda"), "BadNets", "measured")
    # Mean of 90, 91 and 92 is 91, their sample standard deviation 1.
    assert ours["None"] == "91.0 ± 1.0" and ours["Noise salt-pepper"] == "31.0 ± 1.0"
    # (90 + 50 + 70 + 80 + 60) / 5 = 70 and (90 + 40 + 70 + 30 + 60) / 5 = 58, a point more a seed.
    assert ours["AVG pixel, gaussian"] == "71.0 ± 1.0"
    assert ours["AVG block, salt-pepper"] == "59.0 ± 1.0"
    assert ours["seeds"] == "3"


def test_the_spread_of_an_average_is_that_of_the_averages(study: Study) -> None:
    """Columns that swing against each other leave their average still."""
    study.rates("lf", 0, find=lambda c, m: {NONE: 0.8, PIXEL: 0.6}.get(c, 0.5))
    study.rates("lf", 1, find=lambda c, m: {NONE: 0.6, PIXEL: 0.8}.get(c, 0.5))
    ours = row(table(table1(study.records), "table1-asr"), "LF", "measured")
    assert ours["None"] == "70.0 ± 14.1" and ours["AVG pixel, gaussian"] == "58.0 ± 0.0"


def test_one_seed_has_no_spread(study: Study) -> None:
    study.rates("sig", find=lambda c, m: 0.12345)
    ours = row(table(table1(study.records), "table1-ftr"), "SIG", "measured")
    assert ours["None"] == "12.3" and ours["seeds"] == "1"


def test_the_papers_row_is_below_ours_under_both_readings(study: Study) -> None:
    study.rates("ssba")
    page = table1(study.records)
    printed = row(table(page, "table1-asr"), "SSBA", "paper")
    assert printed["None"] == "98.6" and printed["Re-scale"] == "67.5" and printed["seeds"] == "–"
    assert printed["RM pixel"] == printed["RM block"] == "99.0"
    assert printed["AVG pixel, gaussian"] == printed["AVG block, salt-pepper"] == "84.8"
    assert sum(cells[1] == "paper" for cells in table(page, "table1-asr").rows) == 11
    assert not any(cells[1] == "paper" for cells in table(page, "table1-ftr").rows)


def test_each_data_set_has_the_papers_numbers_or_none() -> None:
    for data, none in (("gtsrb", "100.0"), ("imagenet10", "93.2")):
        study = Study(data)
        study.rates("watermark")
        rows = table(table1(study.records), "table1-cda")
        assert row(rows, "Spy-Watermark", "paper")["None"] == none
    study = Study("mnist")
    study.rates("wanet")
    study.stealth("wanet")
    pages = (table1(study.records), table2(study.records))
    assert all(n.source == "measured" for page in pages for n in page.numbers)
    assert row(table(pages[1], "table2-stealth"), "WaNet")["SSIM, paper"] == "–"


def test_a_clean_victim_has_no_attack_success(study: Study) -> None:
    study.rates("clean")
    page, title = table1(study.records), attack_title("clean")
    assert row(table(page, "table1-cda"), title)["None"] == "90.0"
    assert row(table(page, "table1-ftr"), title)["None"] == "1.0"
    assert title not in [cells[0] for cells in table(page, "table1-asr").rows]
    assert not any((n.key["attack"], n.measure) == ("clean", "asr") for n in page.numbers)


def test_an_average_needs_all_five_of_its_columns(study: Study) -> None:
    study.rates("blend", columns=(NONE, PIXEL, ROTATION, GAUSS, SCALE))
    page = table1(study.records)
    ours = row(table(page, "table1-cda"), "Blend", "measured")
    assert ours["AVG pixel, gaussian"] == "90.0"
    assert ours["RM block"] == ours["AVG block, salt-pepper"] == "–"
    missing = row(table(page, "table1-missing"), "Blend")["missing"]
    assert missing.startswith("cda mask-block, cda salt-pepper, asr mask-block")


def test_seeds_are_counted_row_by_row(study: Study) -> None:
    study.rates("blend", 0)
    study.rates("blend", 1, columns=(NONE,))
    ours = row(table(table1(study.records), "table1-cda"), "Blend", "measured")
    assert ours["seeds"] == "1 to 2" and ours["None"] == "90.0 ± 0.0" and ours["RM pixel"] == "90.0"


def test_training_under_corruptions_is_a_table_of_its_own(study: Study) -> None:
    study.rates("badnets", find=lambda c, m: 0.5)
    study.rates("badnets", 3, "corrupted", find=lambda c, m: 0.75)
    for corruptions, rate in (("plain", "50.0"), ("corrupted", "75.0")):
        page = table1(study.records, corruptions)
        assert row(table(page, f"{page.name}-cda"), "BadNets", "measured")["None"] == rate
    with pytest.raises(ValueError, match="corruptions in plain, corrupted, got 'half'"):
        table1(study.records, "half")


def test_coverage_counts_cells_and_names_every_reason(study: Study) -> None:
    for seed in (0, 1):
        for attack in ATTACKS:
            if attack not in ("ssba", "lf") and (attack, seed) != ("sig", 1):
                study.rates(attack, seed)
    study.fail("trigger", "no pattern fools it", attack="lf", seed=0)
    study.fail("victim", "of another training", attack="ssba", corruptions="corrupted", seed=0)
    page = table1(study.records)
    # Attacks with three rates and a clean victim with two, under seven corruptions.
    total, absent = ((len(ATTACKS) - 1) * 3 + 2) * 7, 2 * 3 * 7
    counts = table(page, "table1-coverage").rows
    share = f"{100 * (1 - absent / total):.1f} %"
    assert counts[0][1:] == (str(total - absent), str(total), share)
    assert counts[1][1:3] == (str(2 * total - 5 * 21), str(2 * total))
    assert table(page, "table1-missing").rows == (
        ("SSBA", "0", "all 21 cells", "not run"),
        ("SSBA", "1", "all 21 cells", "not run"),
        ("SIG", "1", "all 21 cells", "not run"),
        ("LF", "0", "all 21 cells", "no pattern fools it"),
        ("LF", "1", "all 21 cells", "not run"),
    )


def test_only_what_was_planned_is_missing() -> None:
    study = Study("mnist", {"attacks": ["wanet", "marksman"], "seeds": [0, 1]})
    study.rates("wanet")
    study.rates("clean")
    missing = [cells[:2] for cells in table(table1(study.records), "table1-missing").rows]
    clean = attack_title("clean")
    assert missing == [("WaNet", "1"), ("Marksman", "0"), ("Marksman", "1"), (clean, "1")]


def test_a_study_of_failures_alone_is_a_table_of_reasons(study: Study) -> None:
    study.fail("victim", "no memory", attack="clean", corruptions="plain", seed=0)
    (page,) = study_pages(study.records)
    assert row(table(page, "table1-missing"), attack_title("clean"))["reason"] == "no memory"
    assert table(page, "table1-coverage").rows[0][3] == "0.0 %"


def test_stealth_is_beside_the_papers(study: Study) -> None:
    study.stealth("badnets", 0)
    study.stealth("badnets", 1, lpips=None)
    study.stealth("equation2")
    page = table2(study.records)
    cells = list(row(table(page, "table2-stealth"), "BadNets").values())
    assert cells[1:4] == ["27.41 ± 0.01", "27.23", "0.995 ± 0.007"]
    assert cells[4:] == ["0.992", "0.100", "0.104", "1 to 2"]
    missing = table(page, "table2-missing")
    assert ("BadNets", "1", "lpips", "no weights") in missing.rows
    assert row(missing, "Blend", "0")["missing"] == "all 3 cells"
    # Three measures; no clean victim.
    assert table(page, "table2-coverage").rows[0][1:3] == ("6", str(3 * (len(ATTACKS) - 1)))


def test_missing_stealth_is_explained_by_what_its_trigger_waited_for(study: Study) -> None:
    study.stealth("badnets")
    study.fail("victim", "diverged", attack="input-aware", corruptions="plain", seed=0)
    study.fail("trigger", "too few images", attack="ssba", seed=0)
    missing = table(table2(study.records), "table2-missing")
    assert row(missing, attack_title("input-aware"))["reason"] == "diverged"
    assert row(missing, "SSBA")["reason"] == "too few images"


def test_learning_has_steps_exposures_and_the_loss_of_accuracy(study: Study) -> None:
    for seed, gap in ((0, -0.01), (1, -0.02)):
        study.victim("badnets", seed, epoch=1 + seed)
        study.rates("badnets", seed, gap=gap)
        study.victim("clean", seed)
    (only,) = learning(study.records).tables
    assert only.rows == (
        (
            "BadNets",
            "471",
            "2000",
            "2 of 2",
            "2000 to 4000",
            "95.0 ± 0.0",
            "-1.5 ± 0.7",
            "–",
            "2.30 to 0.12",
        ),
    )


def test_a_miss_has_a_line_with_what_is_known(study: Study) -> None:
    study.victim("sig", epoch=None, poisoned=1000, poisoned_of_target=0.5)
    study.rates("sig", find=lambda c, m: 0.34, gap=-0.005)
    study.victim("marksman", epoch=3)
    study.rates("marksman", gap=-0.041)
    study.victim("lf", epoch=3)  # not measured: missing in Table 1, no miss here
    page = learning(study.records)
    sig = row(table(page, "learning-plain"), "SIG")
    assert sig["exposures until learned"] == "not learned" and sig["learned"] == "0 of 1"
    assert sig["share of the target class poisoned"] == "0.50"
    assert sig["CDA against clean (points)"] == "-0.5 (-1.5 to +0.5)"
    assert row(table(page, "learning-plain"), "LF")["final ASR (%)"] == "–"
    misses = table(page, "misses-plain").rows
    assert [cells[0] for cells in misses] == ["SIG", "Marksman"]
    assert "34.0 %" in misses[0][2] and "-4.1 (-5.1 to -3.1)" in misses[1][2]


def test_the_bounds_of_a_miss_are_allowed() -> None:
    for asr, gap, missed in ((0.9, -0.03, False), (0.8999, 0.0, True)):
        study = Study()
        study.victim("blend")
        study.rates("blend", find=lambda c, m, asr=asr: asr, gap=gap)
        names = [t.name for t in learning(study.records).tables]
        assert ("misses-plain" in names) is missed


def test_each_training_has_its_own_table_of_learning(study: Study) -> None:
    study.victim("blend", corruptions="corrupted", history={"losses": [1.0], "watched": None})
    (only,) = learning(study.records).tables
    assert only.name == "learning-corrupted" and only.rows[0][-1] == "–"


def test_pages_are_those_that_something_was_tried_for(study: Study) -> None:
    study.rates("badnets")
    assert [page.name for page in attack_pages(study.records)] == ["table1"]
    study.stealth("badnets")
    assert [page.name for page in study_pages(study.records)] == ["table1", "table2"]
    with pytest.raises(ValueError, match="records"):
        study_pages(Study().records)
