"""Tables of made-up scans and mitigations. No number in them was measured."""

from __future__ import annotations

from typing import Any

import pytest

from wm_eval import paper
from wm_eval.numbers import case, named
from wm_eval.pages import study_pages
from wm_eval.pages.detection import detection_page, index_page, where
from wm_eval.pages.mitigation import mitigation_page, paper_page
from wm_eval.records import Failure, Record, StudyRecords
from wm_eval.render import Page, Table, markdown

METHODS = ("fine-tuning", "unlearning-reverse", "nad")
NOTHING = (0.99, 1.0)


def rates(cda: float, asr: float) -> dict[str, Any]:
    intervals = {f"{n}_interval": [r - 0.02, r + 0.02] for n, r in (("cda", cda), ("asr", asr))}
    return {"cda": cda, "asr": asr, "ftr": 0.01, "n_clean": 1000, "n_attack": 900, **intervals}


def change(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 1000}


class Study:
    """Records of a study, in memory."""

    def __init__(self, data: str = "mnist", model: str = "wanet-mnist", **planned: Any) -> None:
        self.entries: list[Record] = []
        self.failures: list[Failure] = []
        self.model = model
        images = {"name": data, "n_train": 60_000, "n_test": 10_000, "n_measured": 10_000}
        self.add("images", images)
        if planned:
            self.add("study", {"planned": planned, "model": model}, study="made-up")

    def add(self, kind: str, values: dict[str, Any], settings: Any = None, **key: Any) -> None:
        self.entries.append(Record(kind, key, settings or {}, {}, "abc", values, {}))

    def victim(self, attack: str, seed: int, cda: float, asr: float) -> None:
        key = {"attack": attack, "corruptions": "plain", "seed": seed}
        self.add("victim", {"history": {}}, {"victim": {"model": self.model, "width": 16}}, **key)
        self.add("rates", {"corruptions": {"none": rates(cda, asr)}}, **key)

    def scan(
        self,
        detector: str,
        attack: str,
        seed: int = 0,
        index: float | None = 1.0,
        suspected: tuple[int, ...] = (),
        paper_flagged: tuple[int, ...] = (),
        **more: Any,
    ) -> None:
        values = {
            "true_target": None if attack == "clean" else 0,
            "paper_index": index,
            "paper_index_low": index,
            "paper_flagged": list(paper_flagged),
            "suspected": list(suspected),
            "verdict": "backdoored" if suspected else "clean",
            "p_value": 0.01 if suspected else 0.6,
            "n_images": 500,
            "reason": "a | b",
        }
        key = {"attack": attack, "corruptions": "plain", "seed": seed}
        self.add("scan", values | more, detector=detector, **key)

    def mitigation(
        self,
        method: str,
        fraction: float = 0.05,
        seed: int = 0,
        *,
        attack: str = "wanet",
        oracle_label: bool = False,
        done: bool = True,
        before: tuple[float, float] = NOTHING,
        after: tuple[float, float] = (0.98, 0.01),
    ) -> None:
        attacked = attack != "clean"
        rating = (max(0.0, before[1] - after[1]) - max(0.0, before[0] - after[0]) + 1) / 2
        values = {
            "done": done,
            "why": "because",
            "labels": [0] if method.startswith("unlearning") and done else [],
            "n_images": round(60_000 * fraction),
            "steps": 400 if done else 0,
            "before": rates(*before),
            "after": rates(*after),
            "cda_change": change(after[0] - before[0]),
            "asr_change": change(after[1] - before[1]) if attacked else None,
            "der": rating if attacked else None,
            "der_interval": [rating - 0.01, rating + 0.01] if attacked else None,
        }
        key: dict[str, Any] = {"method": method, "fraction": fraction, "seed": seed}
        key |= {"attack": attack, "corruptions": "plain", "oracle_label": oracle_label}
        self.add("mitigation", values, **key)

    def rescan(self, suspected: list[int]) -> None:
        verdict = "backdoored" if suspected else "clean"
        values = {"verdict": verdict, "suspected": suspected, "agrees": not suspected}
        values |= {"verdict_before": "backdoored", "named_before": [0]}
        key: dict[str, Any] = {"method": "unlearning-reverse", "detector": "reverse"}
        self.add("rescan", values, fraction=0.05, attack="wanet", seed=0, **key)

    def reactivation(self, method: str, *rates: float) -> None:
        poisoned = zip((1, 20), rates, strict=True)
        values = {"steps": 40, "rows": [{"poisoned": n, "asr": asr} for n, asr in poisoned]}
        key: dict[str, Any] = {"attack": "wanet", "seed": 0, "corruptions": "plain"}
        self.add("reactivation", values, method=method, fraction=0.05, **key)

    @property
    def records(self) -> StudyRecords:
        return StudyRecords(tuple(self.entries), tuple(self.failures))


def table(page: Page, name: str) -> Table:
    return next(t for t in page.tables if t.name == name)


def rows(table: Table) -> list[dict[str, str]]:
    assert all(len(cells) == len(table.headers) for cells in table.rows)
    return [dict(zip(table.headers, cells, strict=True)) for cells in table.rows]


@pytest.fixture
def detection() -> Study:
    """Two seeds on MNIST with WaNet's network."""
    study = Study()
    for seed in (0, 1):
        study.victim("wanet", seed, 0.99, 0.995 - 0.01 * seed)
        study.victim("clean", seed, 0.992, 0.001)
        study.scan("reverse", "wanet", seed, 5.0 + 2 * seed, (0,), (0, 2)[: 1 + seed])
        study.scan("nc", "wanet", seed)
        study.scan("nc", "clean", seed, 1.5 + seed, (), (4,)[:seed])
        study.mitigation("fine-tuning", 0.01, seed, after=(0.98, 0.9))
        study.mitigation("unlearning-reverse", 0.01, seed, after=(0.98, 0.0 if seed else 0.01))
        study.mitigation("unlearning-nc", 0.01, seed, done=False, after=NOTHING)
    study.scan("reverse", "clean", 0, 1.2)
    study.scan("reverse", "clean", 1, None, (3,), (3,), verdict="inconclusive")
    return study


def test_the_papers_tables() -> None:
    assert len(paper.DETECTION) == 14
    assert all(sum(row.cases) == 10 for row in paper.DETECTION.values())
    assert paper.DETECTION["cifar10", "vgg16", "reverse"].cases == (8, 1, 0, 1)
    assert paper.MITIGATION["cifar10", 0.05, "unlearning-reverse"] == (92.96, 2.58)
    assert paper.MITIGATION["cifar10", 0.05, "control"] == (92.50, 82.04)
    # Section 4.3: less than 1 % attack success on MNIST and GTSRB even with 1 % of the data.
    for data in ("mnist", "gtsrb"):
        assert paper.MITIGATION[data, 0.01, "unlearning-reverse"].asr < 1


def test_only_a_verdict_names_labels() -> None:
    scan = {"suspected": [1], "paper_flagged": [2], "verdict": "inconclusive", "true_target": 1}
    assert named(scan) == [] and named(scan, paper=True) == [2]
    assert named(scan | {"verdict": "backdoored"}) == [1]
    assert (case(scan), case(scan, paper=True)) == (4, 3)
    assert case(scan | {"verdict": "backdoored"}) == 1
    assert case(scan | {"verdict": "backdoored", "suspected": [0, 1]}) == 2


def test_detection_is_beside_the_papers(detection: Study) -> None:
    page = detection_page(detection.records)
    cells = {row["detector"]: list(row.values()) for row in rows(page.tables[0])}
    assert cells["Reverse generators"][4:] == [
        "1.20, 1 infinite (1.07)",
        "6.00 ± 1.41 (5.41)",
        "1/1/0/0 (9/1/0/0)",
        "2/0/0/0",
        "1 of 2",
        "0 of 2, 1 inconclusive",
        "2 + 2",
        "98.5 %",
    ]
    nc = cells["Neural Cleanse"][4:8]
    assert nc[:2] == ["2.00 ± 0.71 (1.10)", "1.00 ± 0.00 (0.75)"]
    assert nc[2:] == ["0/0/0/2 (0/0/0/10)", "0/0/0/2"]
    indices = [n for n in page.numbers if n.measure == "paper_index"]
    assert [n.value for n in indices if n.source == "paper" and n.key["detector"] == "reverse"] == [
        1.07,
        5.41,
    ]
    # Infinite is no number.
    assert sum(n.source == "measured" and n.key["detector"] == "reverse" for n in indices) == 3


def test_mitigation_is_beside_the_papers(detection: Study) -> None:
    cells = {
        row["method"]: list(row.values())[5:]
        for row in rows(paper_page(detection.records).tables[0])
    }
    assert cells["Fine-tuning"] == [
        "99.00 ± 0.00",
        "98.00 ± 0.00 (99.37)",
        "99.00 ± 0.71",
        "90.00 ± 0.00 (99.77)",
        "2",
    ]
    assert cells["Unlearning, reverse generators"][3:] == ["0.50 ± 0.71 (0.07)", "2"]
    assert cells["Unlearning, Neural Cleanse"] == ["–", "–", "–", "–", "0 of 2"]
    pages = [page.name for page in study_pages(detection.records)]
    assert pages == ["detection", "mitigation-paper", "mitigation"]


def test_other_networks_and_attacks_have_nothing_printed() -> None:
    study = Study(model="resnet10")
    study.victim("wanet", 0, 0.9, 0.99)
    study.scan("nc", "wanet")
    study.mitigation("unlearning-reverse", 0.01)
    for page in (detection_page(study.records), paper_page(study.records)):
        assert not any("(" in cell for row in page.tables[0].rows for cell in row)
    assert where(study.records, "badnets") == ("MNIST", "ResNet-10, width 16", "BadNets")


def test_an_index_page_has_a_row_for_every_attack() -> None:
    study = Study("cifar10")
    for attack, index, suspected in (("clean", 1.5, ()), ("sig", None, (0,)), ("badnets", 3.2, ())):
        study.scan("nc", attack, 0, index, suspected, asr=0.9 if attack == "sig" else None)
    study.scan("bti-dbf", "sig", 0, 9.0, (4,))
    page = index_page(study.records, "nc")
    assert [row["attack"] for row in rows(page.tables[0])][:2] == ["BadNets", "SIG"]
    sig = rows(page.tables[0])[1]
    assert (sig["index"], sig["verdict"], sig["named right"]) == ("–", "1 backdoored", "1 of 1")
    assert sig["ASR"] == "90.0 %"
    other = rows(index_page(study.records, "bti-dbf").tables[0])
    assert [row["named right"] for row in other] == ["0 of 1"]
    with pytest.raises(ValueError, match="reverse"):
        index_page(study.records, "reverse")


@pytest.fixture
def study() -> Study:
    return Study(
        attacks=["clean", "wanet"], mitigations=list(METHODS), fractions=[0.01, 0.05], seeds=[0]
    )


def test_a_row_has_both_models_and_every_fraction(study: Study) -> None:
    study.mitigation("fine-tuning", 0.01, after=(0.985, 0.9))
    study.mitigation("fine-tuning", 0.05, after=(0.99, 0.5))
    (row,) = rows(table(mitigation_page(study.records), "mitigation"))
    assert (row["attack"], row["method"], row["cleaned"]) == ("WaNet", "Fine-tuning", "2 of 2")
    assert (row["ACC before"], row["ASR before"]) == ("99.0", "100.0")
    assert (row["ACC, 1 %"], row["ASR, 1 %"], row["DER, 1 %"]) == ("98.5", "90.0", "0.547")
    assert (row["ACC, 5 %"], row["ASR, 5 %"], row["DER, 5 %"]) == ("99.0", "50.0", "0.750")
    assert (row["steps"], row["seeds"]) == ("400", "1")


def test_seeds_are_summed_up(study: Study) -> None:
    for seed, asr in ((0, 0.1), (1, 0.3)):
        study.mitigation("nad", 0.05, seed, after=(0.99, asr))
    (row,) = rows(table(mitigation_page(study.records), "mitigation"))
    assert row["ASR, 5 %"] == "20.0 ± 14.1" and row["seeds"] == "2" and row["ASR, 1 %"] == "–"
    assert row["ASR before"] == "100.0 ± 0.0"


def test_a_method_is_summed_up_over_several_attacks(study: Study) -> None:
    for attack, asr in (("wanet", 0.0), ("blend", 0.3)):
        study.mitigation("nad", attack=attack, before=(0.99, 1.0), after=(0.97, asr))
    assert "mitigation-across" not in {t.name for t in mitigation_page(study.records).tables}
    study.mitigation("nad", attack="sig", done=False, before=(0.99, 0.9), after=(0.99, 0.9))
    (row,) = rows(table(mitigation_page(study.records), "mitigation-across"))
    assert (row["clean data"], row["attacks"], row["cleaned"]) == ("5 %", "3", "2 of 3")
    assert (row["mean change of ACC"], row["mean ASR"], row["highest ASR"]) == (
        "-1.3",
        "40.0",
        "90.0",
    )
    assert row["mean DER"] == "0.777"  # of .99, .84 and .5


def test_the_oracle_label_is_a_row_of_its_own(study: Study) -> None:
    study.mitigation("unlearning-reverse", done=False, after=NOTHING)
    study.mitigation("unlearning-reverse", oracle_label=True)
    page = mitigation_page(study.records)
    scanned, oracle = rows(table(page, "mitigation"))
    assert scanned["cleaned"] == "0 of 1"
    assert (scanned["ASR, 5 %"], scanned["DER, 5 %"], scanned["steps"]) == ("100.0", "0.500", "–")
    assert oracle["method"] == f"{scanned['method']}, oracle label"
    assert (oracle["cleaned"], oracle["ASR, 5 %"]) == ("1 of 1", "1.0")
    first, second = rows(table(page, "mitigation-details"))
    assert first["ACC after"] == "not cleaned" and first["DER"] == "–"
    assert second["DER"] == "0.990 (0.980 to 1.000)" and second["labels"] == "0"
    assert second["change of ASR, points"] == "-99.0 (-100.0 to -98.0)"


def test_clean_models_have_a_table_of_their_own(study: Study) -> None:
    study.mitigation("nad", attack="clean", after=(0.93, 0.01))
    study.mitigation("unlearning-reverse", attack="clean", done=False, after=(0.99, 0.01))
    page = mitigation_page(study.records)
    by_method = {row["method"]: row for row in rows(table(page, "mitigation-clean"))}
    assert by_method["NAD"]["change, 5 %"] == "-6.0" and by_method["NAD"]["ACC, 5 %"] == "93.0"
    assert by_method["Unlearning, reverse generators"]["cleaned"] == "0 of 1"
    assert "mitigation" not in [t.name for t in page.tables]
    details = rows(table(page, "mitigation-details"))
    nad = next(row for row in details if row["method"] == "NAD")
    assert nad["ASR after"] == nad["DER"] == "–"


def test_scans_before_and_after(study: Study) -> None:
    study.mitigation("unlearning-reverse")
    study.scan("reverse", "wanet", suspected=(0,))
    study.scan("reverse", "clean")
    study.rescan([])
    page = mitigation_page(study.records)
    clean, wanet = rows(table(page, "mitigation-scans"))
    assert (clean["labels named"], clean["true target"]) == ("–", "–")
    assert list(wanet.values())[3:6] == ["backdoored", "0", "0"]
    (again,) = rows(table(page, "mitigation-rescans"))
    assert list(again.values())[4:] == ["backdoored (0)", "clean (–)", "yes"]
    assert "a \\| b" in markdown(page)


def test_what_few_poisoned_images_bring_back(study: Study) -> None:
    study.mitigation("nad", after=(0.95, 0.02))
    study.reactivation("nad", 0.4, 0.9)
    study.reactivation("clean-victim", 0.0, 0.3)
    fresh, repaired = table(mitigation_page(study.records), "mitigation-reactivation").rows
    assert fresh[3:] == ("–", "0.0", "30.0", "40", "0")
    assert repaired[1:] == ("NAD", "5 %", "2.0", "40.0", "90.0", "40", "0")


def test_what_is_missing_has_a_reason(study: Study) -> None:
    study.mitigation("fine-tuning")
    key = {"method": "nad", "fraction": 0.05, "attack": "wanet", "seed": 0}
    study.failures.append(Failure("mitigation", {**key, "oracle_label": False}, "no layers there"))
    missing = rows(table(mitigation_page(study.records), "mitigation-missing"))
    assert len(missing) == 11  # of 2 victims x 3 methods x 2 fractions
    why = {(r["victim"], r["method"], r["clean data"]): r["reason"] for r in missing}
    assert why["WaNet", "NAD", "5 %"] == "no layers there"
    assert why["WaNet", "NAD", "1 %"] == "not run"
