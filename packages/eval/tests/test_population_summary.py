"""What a population says of its detectors, on scans whose answers are made up and known.

No figure in it was measured.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from defense_nc import ModelInfo, Verdict, judge
from defense_nc.verdict.calibration import read_calibrations
from wm_eval.cli import main
from wm_eval.detectors import HOUSE
from wm_eval.intervals import exact_interval
from wm_eval.measure import scan_values
from wm_eval.population.config import World, population_profile
from wm_eval.population.counts import Row, Scan, auroc_interval
from wm_eval.population.plan import coverage_table, write_plan
from wm_eval.population.summary import (
    TOGETHER,
    Population,
    calibrate,
    read_scans,
    summarise,
)
from wm_eval.population.tables import population_tables, write_population
from wm_eval.records import Record, versions, write_record
from wm_eval.tables import ABSENT

STUDY = population_profile("tiny").worlds["digits-plain"].study
LABELS = 10
SETTINGS = {"steps": 100, "lr": 0.1}
LOW = 0.001  # what a backdoor does to the score of its label


def clean_scores(seed: int) -> Tensor:
    """Scores of a clean model, a fifth apart in logarithms, evenly: none ever stands out."""
    order = torch.randperm(LABELS, generator=torch.Generator().manual_seed(seed))
    steps = torch.linspace(-0.3, 0.3, LABELS).double()[order]
    return 50 * (1 + seed % 7 / 100) * (steps * (1 + seed % 5 / 10)).exp()


def scan(
    attack: str = "clean",
    seed: int = 0,
    *,
    low: dict[int, float] | None = None,
    scores: Tensor | None = None,
    reached: int = LABELS,
    asr: float | None = None,
    detector: str = "nc",
    world: str = "one",
    settings: Any = SETTINGS,
    images: int = 100,
) -> Scan:
    """A scan's record: ``low`` multiplies the scores of some labels."""
    scores = clean_scores(seed) if scores is None else scores
    for label, factor in (low or {}).items():
        scores[label] *= factor
    rates = (torch.arange(len(scores)) < reached).double()
    subject = ModelInfo(len(scores), 16, 1, "convolutional", 100)
    report = judge(f"long-{detector}", scores, rates, floor=0.9, seed=seed, subject=subject)
    values = scan_values(report) | {
        "attack": attack,
        "half": "test" if seed >= 1000 else "calibration",
        "defence": detector,
        "preset": "fast",
        "model": "resnet10",
        "data": "digits",
        "cda": 0.99,
        "asr": asr,
        "true_target": None if attack == "clean" else seed % LABELS,
        "settings": {"settings": {"detector": settings, "images": images}},
        "versions": {"torch": "2.0"},
    }
    return Scan(world, f"scan-{detector}-{attack}-{seed}", values)


def null(count: int = 12, **more: Any) -> list[Scan]:
    return [scan(seed=seed, **more) for seed in range(count)]


def known(**more: Any) -> list[Scan]:
    """Five clean models, one called backdoored; six backdoored ones, of every kind."""
    return [
        *null(**more),
        *(scan(seed=1000 + i, **more) for i in range(3)),
        scan(seed=1003, low={7: LOW}, **more),  # a false alarm
        scan(seed=1004, reached=3, **more),  # inconclusive
        scan("badnets", 1000, low={0: LOW}, asr=1.0, **more),
        scan("badnets", 1001, low={1: LOW}, asr=0.9, **more),
        scan("badnets", 1002, low={9: LOW}, asr=0.95, **more),  # a wrong label
        scan("badnets", 1003, asr=0.99, **more),  # missed
        scan("badnets", 1004, low={4: LOW}, asr=0.89, **more),  # below the floor
        scan("badnets", 1005, low={5: LOW}, reached=4, asr=1.0, **more),  # the label is not reached
    ]


def only(found: Population, detector: str, attack: str, world: str = "one") -> Row:
    (row,) = [r for r in found.rows if (r.detector, r.attack, r.world) == (detector, attack, world)]
    return row


def write(out: Path, scans: list[Scan]) -> Path:
    """Records as a run leaves them."""
    for one in scans:
        values = {k: v for k, v in one.values.items() if k not in ("settings", "versions")}
        config = one.values["settings"]
        record = Record(one.name, config, values["seed"], "abc", {**values, "files": {}})
        write_record(out / one.world / "records" / f"{one.name}.json", record)
    return out


def test_clean_models_are_counted() -> None:
    row = only(summarise(known()), "nc", "clean")
    assert (row.trained, row.judged, row.inconclusive) == (5, 5, 1)
    assert row.flagged == (1, 5) and row.flagged.interval == exact_interval(1, 5)
    assert row.named is row.asr_min is row.auroc is row.paper_named is None


def test_backdoored_models_are_counted() -> None:
    row = only(summarise(known()), "nc", "badnets")
    assert (row.trained, row.judged) == (6, 5)  # one is below the floor
    assert row.flagged == (3, 5)
    assert row.named == (2, 5)  # a wrong label is no success
    assert row.inconclusive == 1
    assert row.asr_min == 0.9


def test_the_floor_is_inclusive_and_a_setting() -> None:
    assert only(summarise(known(), floor=0.89), "nc", "badnets").judged == 6
    assert only(summarise(known(), floor=0.96), "nc", "badnets").judged == 3
    none = only(summarise([*known()[:-6], scan("badnets", 1000, asr=0.2)]), "nc", "badnets")
    assert (none.trained, none.judged, none.named, none.auroc) == (1, 0, None, None)


def test_the_papers_rule_stands_beside() -> None:
    found = summarise(known())
    row = only(found, "nc", "badnets")
    # The papers compare labels that were not reached as well: theirs names label 5 of the last.
    assert row.paper_named == (3, 5)
    flagged = [bool(j.paper_flagged) for j in found.judged["nc"] if j.scan.attack == "clean"]
    assert only(found, "nc", "clean").paper_flagged == (sum(flagged), 5)


def test_a_model_with_an_infinite_index_is_compared() -> None:
    scores = torch.full((LABELS,), 50.0).double()
    scans = [*known(), scan("blend", 1000, scores=scores, low={0: LOW}, asr=1.0)]
    assert scans[-1].values["paper_index"] is None
    row = only(summarise(scans), "nc", "blend")
    assert row.paper_auroc == 1.0 and row.named == (1, 1)


def test_auroc_is_that_of_p_values() -> None:
    row = only(summarise(known()), "nc", "badnets")
    # Of 5 x 5 pairs: three backdoored models outdo four clean ones, and may tie with the fifth.
    assert row.auroc is not None and row.auroc_interval is not None
    assert row.auroc >= 12 / 25
    assert row.auroc_interval[0] <= row.auroc <= row.auroc_interval[1]


def test_two_detectors_share_the_error_rate() -> None:
    # Where a model is called backdoored at 0.05 and not at 0.025.
    calibration = calibrate(null())
    lower, upper = 0.0, 1.0
    for _ in range(60):
        middle = (lower + upper) / 2
        scores = scan(seed=1000, low={0: middle}).values["labels"]
        logs = torch.tensor([label["score"] for label in scores]).double().log()
        if float(calibration.p_values(logs).min()) > 0.035:
            upper = middle
        else:
            lower = middle
    scans = [*null(), *null(detector="reverse")]
    for detector in ("nc", "reverse"):
        scans.append(scan("badnets", 1000, low={0: lower}, asr=1.0, detector=detector))
    found = summarise(scans)
    assert only(found, "nc", "badnets").named == (1, 1)
    assert only(found, "reverse", "badnets").named == (1, 1)
    assert only(found, TOGETHER, "badnets").named == (0, 1)
    (both,) = found.judged[TOGETHER]
    assert both.p_value == pytest.approx(2 * found.judged["nc"][0].p_value)
    assert both.p_value == pytest.approx(0.07, rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ({"low": {0: LOW}}, {}, Verdict.BACKDOORED),
        ({"low": {0: LOW}}, {"reached": 3}, Verdict.BACKDOORED),
        ({}, {"reached": 3}, Verdict.INCONCLUSIVE),
        ({}, {}, Verdict.CLEAN),
    ],
)
def test_one_detector_is_enough_and_clean_takes_both(
    ours: dict[str, Any], theirs: dict[str, Any], verdict: Verdict
) -> None:
    scans = [*null(), *null(detector="reverse")]
    scans.append(scan("badnets", 1000, asr=1.0, **ours))
    scans.append(scan("badnets", 1000, asr=1.0, detector="reverse", **theirs))
    (both,) = summarise(scans).judged[TOGETHER]
    assert both.verdict is verdict
    assert both.right == (verdict is Verdict.BACKDOORED)


def test_what_one_detector_has_not_seen_is_left_out_of_both() -> None:
    scans = [*known(), *null(detector="reverse"), scan(seed=1000, detector="reverse")]
    found = summarise(scans)
    assert [j.scan.values["seed"] for j in found.judged[TOGETHER]] == [1000]
    assert found.judged[TOGETHER][0].paper_index is None
    assert only(found, TOGETHER, "clean").paper_flagged is None


def test_one_detector_needs_no_correction() -> None:
    assert TOGETHER not in summarise(known()).judged


def ours() -> list[Scan]:
    """Both detectors of the house, on the same models."""
    return [*known(), *known(detector="reverse")]


def test_rivals_stand_beside_and_change_nothing() -> None:
    # They have seen one world of two, and of the backdoored models some.
    house = [*ours(), *(scan(seed=1010, world="two", detector=d) for d in HOUSE)]
    rivals = null(6, detector="bti-dbf")
    rivals.append(scan("badnets", 1000, low={0: LOW}, asr=1.0, detector="bti-dbf"))
    alone, found = summarise(house), summarise([*rivals, *house])
    assert list(found.judged) == ["nc", "reverse", TOGETHER, "bti-dbf"]
    assert found.rows[: len(alone.rows)] == alone.rows and not found.left_out
    beside = found.rows[len(alone.rows) :]
    assert [(r.detector, r.attack, r.world, r.named) for r in beside] == [
        ("bti-dbf", "badnets", "one", (1, 1))
    ]
    assert found.judged["bti-dbf"][0].verdict is Verdict.BACKDOORED
    assert len(found.calibrations["bti-dbf", 10].models) == 6


def test_two_rivals_are_not_taken_together() -> None:
    scans = [*known(detector="bti-dbf"), *known(detector="feature-re"), *known()]
    assert list(summarise(scans).judged) == ["nc", "bti-dbf", "feature-re"]


def test_a_detector_without_enough_clean_models_is_left_out() -> None:
    few = [*null(4, detector="bti-dbf"), scan(seed=4, reached=3, detector="bti-dbf")]
    few += [scan(seed=1000, detector="feature-re")]
    alone, found = summarise(ours()), summarise([*ours(), *few])
    assert found.left_out == {("bti-dbf", 10): 4, ("feature-re", 10): 0}
    assert (found.calibrations, found.judged, found.rows) == alone[:3]
    told = "Not judged, with fewer than 5 clean models to calibrate on: BTI-DBF: 4; FeatureRE: 0."
    assert told in population_tables(found)[0].note
    assert "Not judged" not in population_tables(alone)[0].note


def test_every_number_of_classes_has_a_calibration_of_its_own() -> None:
    def wider(seed: int) -> Scan:
        scores = torch.cat([clean_scores(seed), clean_scores(seed + 1)])
        return scan(seed=seed, scores=scores, reached=2 * LABELS, world="wide")

    alone = summarise(known())
    found = summarise([*known(), *map(wider, (0, 1, 2, 3, 4, 1000, 1001))])
    assert found.calibrations["nc", 10] == alone.calibrations["nc", 10]
    assert len(found.calibrations["nc", 20].models) == 5
    assert [j for j in found.judged["nc"] if j.scan.world == "one"] == list(alone.judged["nc"])
    assert only(found, "nc", "clean", "wide").judged == 2
    note = population_tables(found)[0].note
    assert "Neural Cleanse on 10 classes: 12; Neural Cleanse on 20 classes: 5" in note
    few = summarise([*known(), *map(wider, (0, 1000))])
    assert few.left_out == {("nc", 20): 1} and few.judged == alone.judged


def test_one_of_the_house_left_out_leaves_nothing_together() -> None:
    found = summarise([*known(), *null(4, detector="reverse")])
    assert list(found.judged) == ["nc"] and found.left_out == {("reverse", 10): 4}


def test_several_worlds_are_also_summed_up() -> None:
    other = [scan(seed=1000, world="two"), scan("badnets", 1000, asr=0.1, world="two")]
    found = summarise([*known(), *other])
    assert only(found, "nc", "clean", "all").flagged == (1, 6)
    assert only(found, "nc", "clean", "two").flagged == (0, 1)
    assert only(found, "nc", "badnets", "all").named == (2, 5)
    assert only(found, "nc", "badnets", "two").judged == 0


def test_the_test_half_chooses_nothing() -> None:
    first = summarise(known()).calibrations
    scans = null()
    scans += [scan(seed=1000 + i, scores=torch.rand(LABELS).double() * 9) for i in range(4)]
    scans += [scan("badnets", i, low={3: LOW}, asr=1.0) for i in range(4)]  # nor these: not clean
    assert summarise(scans).calibrations == first


def test_the_calibration_half_chooses_and_is_not_judged() -> None:
    found = summarise(known())
    changed = [*null(), *known()[12:]]
    changed[0] = scan(seed=0, low={2: 0.5})
    assert summarise(changed).calibrations != found.calibrations
    assert all(j.scan.values["half"] == "test" for j in found.judged["nc"])
    assert len(found.judged["nc"]) == 11


def test_a_calibration_knows_where_it_comes_from() -> None:
    found = calibrate([*null(), scan(seed=20, reached=3)])
    assert (found.detector, found.preset, found.settings) == ("long-nc", "fast", SETTINGS)
    assert found.versions == {"torch": "2.0"}
    # The one that was inconclusive taught nothing.
    assert [model.name for model in found.models] == [f"one/scan-nc-clean-{i}" for i in range(12)]


@pytest.mark.parametrize("seed", [12, 1000])
def test_other_settings_in_either_half_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="expected one set of detector settings in both halves"):
        summarise([*null(), scan(seed=seed, settings={"steps": 1})])


@pytest.mark.parametrize("seed", [12, 1000])
def test_another_number_of_images_in_either_half_is_refused(seed: int) -> None:
    told = "expected one number of the defender's images in both halves, got 100, 250"
    with pytest.raises(ValueError, match=told):
        summarise([*null(), scan(seed=seed, images=250)])
    with pytest.raises(ValueError, match=told):
        calibrate([*null(), scan(seed=seed, images=250)])
    # Each detector has its own null distribution, and may have images of its own.
    summarise([*null(), *null(detector="bti-dbf", images=250)])


def test_what_cannot_be_summed_up() -> None:
    with pytest.raises(ValueError, match="at least 5 clean models to calibrate on, got 4"):
        summarise(null(4))
    with pytest.raises(ValueError, match="at least 5 clean models to calibrate on, got 3"):
        summarise([*null(2), *null(3, detector="reverse")])
    with pytest.raises(ValueError, match="at least one scan"):
        summarise([])
    with pytest.raises(ValueError, match="floor"):
        summarise(known(), floor=0.0)
    with pytest.raises(ValueError, match="alpha"):
        summarise(known(), alpha=1.0)


def test_auroc_intervals_that_are_known() -> None:
    truths = torch.tensor([False, False, False, True, True])
    assert auroc_interval(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), truths) == (1.0, 1.0)
    assert auroc_interval(torch.tensor([2.0, 3.0, 4.0, 0.0, 1.0]), truths) == (0.0, 0.0)
    assert auroc_interval(torch.ones(5), truths) == (0.5, 0.5)
    # One of two wins: the samples' means are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4.
    two = torch.tensor([False, True, True])
    assert auroc_interval(torch.tensor([1.0, 0.0, 2.0]), two) == (0.0, 1.0)


def test_auroc_intervals_are_mirrored_and_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, generator=generator).double()
    truths = torch.arange(30) < 12
    low, high = auroc_interval(scores, truths, draws=500)
    assert 0 < low < high < 1
    assert auroc_interval(-scores, truths, draws=500) == pytest.approx((1 - high, 1 - low))
    assert auroc_interval(scores, truths, draws=500) == (low, high)
    assert auroc_interval(scores, truths, draws=500, seed=1) != (low, high)


def test_auroc_intervals_refuse_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="triggered and clean"):
        auroc_interval(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="draws >= 1"):
        auroc_interval(torch.ones(2), torch.tensor([True, False]), draws=0)


def test_records_are_read_back(tmp_path: Path) -> None:
    scans = known()
    found = read_scans(write(tmp_path, scans))
    assert {s.name for s in found} == {s.name for s in scans}
    assert {s.world for s in found} == {"one"}
    again, first = summarise(found), summarise(scans)
    for name in ("trained", "judged", "flagged", "named", "inconclusive", "paper_named"):
        for attack in ("clean", "badnets"):
            rows = [only(f, "nc", attack) for f in (again, first)]
            assert getattr(rows[0], name) == getattr(rows[1], name)
    assert again.calibrations["nc", 10].versions == versions()


def test_tables_are_written(tmp_path: Path) -> None:
    write(tmp_path, ours())
    page, numbers = write_population(tmp_path)
    assert (page.name, numbers.name) == ("population.md", "population.csv")
    text = page.read_text()
    assert "1 of 5" in text and "2 of 5" in text and "5 of 6" in text
    assert "all detectors (Bonferroni)" in text and "BadNets" in text
    rows = list(csv.DictReader(numbers.read_text().splitlines()))
    assert [(row["detector"], row["attack"]) for row in rows] == [
        (detector, attack)
        for detector in ("nc", "reverse", "all")
        for attack in ("clean", "badnets")
    ]
    nc = rows[1]
    assert (nc["trained"], nc["judged"], nc["flagged"], nc["named"]) == ("6", "5", "3", "2")
    assert rows[0]["named"] == rows[0]["auroc"] == "" and rows[-1]["paper_auroc"] == ""
    assert (nc["flagged_low"], nc["flagged_high"]) == tuple(map(str, exact_interval(3, 5)))
    assert (nc["named_low"], nc["named_high"]) == tuple(map(str, exact_interval(2, 5)))
    low, auroc, high = (float(nc[name]) for name in ("auroc_low", "auroc", "auroc_high"))
    assert 0 <= low < auroc < high <= 1
    assert rows[0]["named_low"] == rows[0]["auroc_high"] == rows[-1]["paper_named_low"] == ""
    before = page.read_bytes(), numbers.read_bytes()
    write_population(tmp_path)
    assert (page.read_bytes(), numbers.read_bytes()) == before


def test_the_cross_table_holds_attacks_by_detectors() -> None:
    _, _, cross = population_tables(summarise([*known(), *null(detector="reverse")]))
    assert cross.headers == (
        "attack",
        "lowest ASR",
        "Neural Cleanse",
        "Reverse generators",
        "all detectors (Bonferroni)",
    )
    clean, badnets = cross.rows
    assert clean[2].startswith("1 of 5") and clean[3] == ABSENT
    assert badnets[2].startswith("2 of 5") and badnets[3] == badnets[4] == ABSENT


def test_beside_rivals_the_two_of_the_house_are_named() -> None:
    tables = population_tables(summarise([*ours(), *known(detector="bti-dbf")]))
    both = "Neural Cleanse + Reverse generators (Bonferroni)"
    assert tables[2].headers[2:] == ("Neural Cleanse", "Reverse generators", both, "BTI-DBF")
    for table in tables[:2]:
        assert [row[0] for row in table.rows] == list(tables[2].headers[2:])
    assert "Not every detector has seen the same models" in tables[2].note


def test_what_is_planned_is_counted(tmp_path: Path) -> None:
    scans = [*ours(), scan(seed=5, detector="bti-dbf")]
    before = [path.read_bytes() for path in write_population(write(tmp_path, scans))]
    assert b"What is done" not in before[0]
    write_plan(tmp_path / "one", World(STUDY, {"clean": 14}, {"clean": 5, "badnets": 8}))
    write_plan(tmp_path / "two", World(STUDY, {}, {"clean": 0, "blend": 3}))
    table = coverage_table(tmp_path, read_scans(tmp_path))
    assert table is not None
    assert table.headers == (
        *("world", "half", "models", "Neural Cleanse", "Reverse generators", "BTI-DBF"),
    )
    assert table.rows == (
        ("one", "calibration", "No attack (clean victim)", "12 of 14", "12 of 14", "1 of 14"),
        ("one", "test", "No attack (clean victim)", "5 of 5", "5 of 5", "0 of 5"),
        ("one", "test", "BadNets", "6 of 8", "6 of 8", "0 of 8"),
        ("two", "test", "Blend", "0 of 3", "0 of 3", "0 of 3"),
    )
    after = [path.read_bytes() for path in write_population(tmp_path)]
    assert after[0].startswith(before[0]) and b"What is done" in after[0]
    assert after[1] == before[1]


def test_the_command_renders_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, known())
    file = tmp_path / "new" / "calibration.json"
    told = ["population", "--only-tables", "--out", str(tmp_path), "--calibrate", str(file)]
    assert main(told) == 0
    said = capsys.readouterr().out
    assert "population.md" in said and "population.csv" in said and str(file) in said
    (kept,) = read_calibrations(file)
    assert kept == calibrate(read_scans(tmp_path))


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["population", "--profile", "tiny", "--out", str(tmp_path)]
    assert main([*told, "--only-tables"]) == 1
    assert "expected the scans of a population" in capsys.readouterr().err
    # A run that was stopped early has done its work: there is nothing to render yet.
    monkeypatch.setattr("wm_eval.population.run.run_population", lambda *_, **__: [])
    assert main(told) == 0
    assert "no tables yet: expected the scans" in capsys.readouterr().out
    assert main([*told, "--only-train"]) == 0
    assert main([*told, "--detectors", "nothing"]) == 1
    assert "expected a detector in" in capsys.readouterr().err
