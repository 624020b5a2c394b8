"""Made-up scans of a population. No number in them was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from defense_nc import Calibration, ModelInfo, Verdict, judge
from defense_nc.verdict import refit
from wm_eval.intervals import exact_interval
from wm_eval.measure import scan_values
from wm_eval.pages import study_pages
from wm_eval.pages.calibration import calibration_page, population_tables, shipped_table
from wm_eval.population import (
    ANY_CLASSES,
    COMBINED,
    Population,
    Row,
    auroc_interval,
    calibrate,
    calibrations_of,
    judge_shipped,
    population_scans,
    summarise,
)
from wm_eval.records import Failure, Record, StudyRecords
from wm_eval.render import ABSENT
from wm_eval.titles import PAPERS

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
    setting: str = "one",
    settings: Any = SETTINGS,
    images: int = 100,
) -> Record:
    """A scan's record: ``low`` multiplies the scores of some labels."""
    scores = clean_scores(seed) if scores is None else scores
    for label, factor in (low or {}).items():
        scores[label] *= factor
    rates = (torch.arange(len(scores)) < reached).double()
    info = ModelInfo(len(scores), 16, 1, "convolutional", 100)
    report = judge(f"long-{detector}", scores, rates, floor=0.9, seed=seed, subject=info)
    values = scan_values(report) | {
        "preset": "fast",
        "model": "resnet10",
        "data": "digits",
        "asr": asr,
        "true_target": None if attack == "clean" else seed % LABELS,
    }
    split = "test" if seed >= 1000 else "calibration"
    key = {"attack": attack, "detector": detector, "seed": seed, "setting": setting, "split": split}
    given = {"detector": settings, "images": images}
    return Record("scan", key, given, {}, "abc", values, {"torch": "2.0"})


def null(count: int = 12, **more: Any) -> list[Record]:
    return [scan(seed=seed, **more) for seed in range(count)]


def known(**more: Any) -> list[Record]:
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


def only(population: Population, detector: str, attack: str, setting: str = "one") -> Row:
    (row,) = [
        r
        for r in population.rows
        if (r.detector, r.attack, r.setting) == (detector, attack, setting)
    ]
    return row


def of_kind(kind: str, seed: int, attack: str = "clean", **more: Any) -> Record:
    """A scan of the unseen split."""
    record = scan(attack, 2000 + seed, setting=kind, **more)
    record.key["split"] = "unseen"
    record.values["model"] = kind
    return record


def test_the_clean_models_of_several_studies_join_where_they_were_scanned_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [of_kind(kind, 3 * i + j) for i, kind in enumerate("ab") for j in range(3)]
    more = [of_kind(kind, 10 + 3 * i + j) for i, kind in enumerate("ac") for j in range(3)]
    others = [*more, *null(5), of_kind("a", 30, settings={"steps": 7})]  # the last six do not
    # Of kind b by the three of kind a here, and by the six there.
    alone, joined = summarise(own), summarise(own, beside=others)
    assert not alone.judged["nc"]
    assert {id(j.record) for j in joined.judged["nc"]} == {id(r) for r in own}
    by_hand = calibrate([*own[:3], *more])
    (last,) = [j for j in joined.judged["nc"] if j.record is own[5]]
    scores = torch.tensor([label["score"] for label in own[5].values["labels"]]).double()
    assert last.p_value == pytest.approx(
        float(by_hand.p_values(scores.log(), ModelInfo(LABELS, 16, 1, "convolutional", 100)).min())
    )
    studies = {"one": StudyRecords(tuple(own)), "two": StudyRecords(tuple(others))}
    monkeypatch.setattr("wm_eval.population.read_study", lambda folder: studies[folder.name])
    (shipped,) = calibrations_of(Path("one"), Path("two"))
    names = [model.name.split("/")[0] for model in shipped.models]
    assert names == ["one"] * 6 + ["two"] * 6 and refit(shipped) == shipped


def test_models_of_two_studies_may_share_a_name() -> None:
    def scans(name: str) -> list[Record]:
        plan = Record("study", {"study": name}, {}, {}, "abc", {}, {})
        models = [of_kind(kind, seed) for kind in "ab" for seed in range(3)]
        return population_scans(StudyRecords((plan, *models)))

    (fitted,) = summarise(scans("one"), beside=scans("two")).calibrations.values()
    assert len({model.name for model in fitted.models}) == len(fitted.models) == 12


def test_pairs_are_named_if_every_class_has_its_goal() -> None:
    pair = scan("badnets-source-specific", 1001, low={1: LOW}, asr=1.0)
    pair.values["true_pairs"] = [[2, 1]]
    pair.values["labels"][1]["source"] = 2
    wrong = scan("badnets-source-specific", 1001, low={1: LOW}, asr=1.0)
    wrong.values["true_pairs"] = [[2, 1]]
    wrong.values["labels"][1]["source"] = 0
    mapped = scan("badnets-all-to-all", 1002, asr=1.0)
    mapped.values["true_pairs"] = [[k, (k + 1) % LABELS] for k in range(LABELS)]
    for row in mapped.values["labels"]:
        row["source"] = (row["label"] - 1) % LABELS
    mapped.values["finding"] = {"labels": list(range(LABELS)), "reason": "One picture."}
    found = summarise([*known(), pair])
    assert only(found, "nc", "badnets-source-specific").named.hits == 1  # type: ignore[union-attr]
    found = summarise([*known(), wrong, mapped])
    specific = only(found, "nc", "badnets-source-specific")
    assert specific.flagged.hits == 1 and specific.named.hits == 0  # type: ignore[union-attr]
    every = only(found, "nc", "badnets-all-to-all")
    assert every.named.hits == 1 and every.auroc == 1  # type: ignore[union-attr]


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
    population = summarise(known())
    row = only(population, "nc", "badnets")
    # The papers compare labels that were not reached as well: theirs names label 5 of the last.
    assert row.paper_named == (3, 5)
    flagged = [
        bool(j.paper_flagged) for j in population.judged["nc"] if j.record.key["attack"] == "clean"
    ]
    assert only(population, "nc", "clean").paper_flagged == (sum(flagged), 5)


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
    # On other clean models: nothing is known of both detectors together.
    others = [replace(r, key={**r.key, "setting": "other"}) for r in null(detector="reverse")]
    scans = [*null(), *others]
    for detector in ("nc", "reverse"):
        scans.append(scan("badnets", 1000, low={0: lower}, asr=1.0, detector=detector))
    population = summarise(scans)
    assert only(population, "nc", "badnets").named == (1, 1)
    assert only(population, "reverse", "badnets").named == (1, 1)
    assert only(population, COMBINED, "badnets").named == (0, 1)
    (both,) = population.judged[COMBINED]
    assert both.p_value == pytest.approx(2 * population.judged["nc"][0].p_value)
    assert both.p_value == pytest.approx(0.07, rel=1e-3)
    scans = [*(r for r in scans if r.key["setting"] == "one"), *null(detector="reverse")]
    assert only(summarise(scans), COMBINED, "badnets").named == (1, 1)


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
    (both,) = summarise(scans).judged[COMBINED]
    assert both.verdict is verdict
    assert both.correct == (verdict is Verdict.BACKDOORED)


def test_what_one_detector_has_not_seen_is_left_out_of_both() -> None:
    scans = [*known(), *null(detector="reverse"), scan(seed=1000, detector="reverse")]
    population = summarise(scans)
    assert [j.record.key["seed"] for j in population.judged[COMBINED]] == [1000]
    assert population.judged[COMBINED][0].paper_index is None
    assert only(population, COMBINED, "clean").paper_flagged is None


def test_one_detector_needs_no_correction() -> None:
    assert COMBINED not in summarise(known()).judged


def ours() -> list[Record]:
    """Both detectors of the pair, on the same models."""
    return [*known(), *known(detector="reverse")]


def test_other_detectors_change_nothing() -> None:
    # They have seen one setting of two, and of the backdoored models some.
    pair = [*ours(), *(scan(seed=1010, setting="two", detector=d) for d in PAPERS)]
    others = null(6, detector="bti-dbf")
    others.append(scan("badnets", 1000, low={0: LOW}, asr=1.0, detector="bti-dbf"))
    alone, population = summarise(pair), summarise([*others, *pair])
    assert list(population.judged) == ["nc", "reverse", COMBINED, "bti-dbf"]
    assert population.rows[: len(alone.rows)] == alone.rows and not population.left_out
    beside = population.rows[len(alone.rows) :]
    assert [(r.detector, r.attack, r.setting, r.named) for r in beside] == [
        ("bti-dbf", "badnets", "one", (1, 1))
    ]
    assert population.judged["bti-dbf"][0].verdict is Verdict.BACKDOORED
    assert len(population.calibrations["bti-dbf", 10].models) == 6


def test_two_other_detectors_are_not_combined() -> None:
    scans = [*known(detector="bti-dbf"), *known(detector="feature-re"), *known()]
    assert list(summarise(scans).judged) == ["nc", "bti-dbf", "feature-re"]


def test_a_detector_without_enough_clean_models_is_left_out() -> None:
    few = [*null(4, detector="bti-dbf"), scan(seed=4, reached=3, detector="bti-dbf")]
    few += [scan(seed=1000, detector="feature-re")]
    alone, population = summarise(ours()), summarise([*ours(), *few])
    assert population.left_out == {("bti-dbf", 10): 4, ("feature-re", 10): 0}
    assert (population.calibrations, population.judged, population.rows) == alone[:3]
    assert "BTI-DBF: 4; FeatureRE: 0" in population_tables(population)[0].note


def test_every_number_of_classes_has_a_calibration_of_its_own() -> None:
    def wider(seed: int) -> Record:
        scores = torch.cat([clean_scores(seed), clean_scores(seed + 1)])
        return scan(seed=seed, scores=scores, reached=2 * LABELS, setting="wide")

    alone = summarise(known())
    population = summarise([*known(), *map(wider, (0, 1, 2, 3, 4, 1000, 1001))])
    assert population.calibrations["nc", 10] == alone.calibrations["nc", 10]
    assert len(population.calibrations["nc", 20].models) == 5
    assert [j for j in population.judged["nc"] if j.record.key["setting"] == "one"] == list(
        alone.judged["nc"]
    )
    assert only(population, "nc", "clean", "wide").judged == 2
    note = population_tables(population)[0].note
    assert "Neural Cleanse on 10 classes: 12; Neural Cleanse on 20 classes: 5" in note
    few = summarise([*known(), *map(wider, (0, 1000))])
    assert few.left_out == {("nc", 20): 1} and few.judged == alone.judged


def test_one_of_the_pair_left_out_leaves_nothing_combined() -> None:
    population = summarise([*known(), *null(4, detector="reverse")])
    assert list(population.judged) == ["nc"] and population.left_out == {("reverse", 10): 4}


def test_several_settings_are_also_summed_up() -> None:
    other = [scan(seed=1000, setting="two"), scan("badnets", 1000, asr=0.1, setting="two")]
    population = summarise([*known(), *other])
    assert only(population, "nc", "clean", "all").flagged == (1, 6)
    assert only(population, "nc", "clean", "two").flagged == (0, 1)
    assert only(population, "nc", "badnets", "all").named == (2, 5)
    assert only(population, "nc", "badnets", "two").judged == 0


def test_the_test_split_chooses_nothing() -> None:
    first = summarise(known()).calibrations
    scans = null()
    scans += [scan(seed=1000 + i, scores=torch.rand(LABELS).double() * 9) for i in range(4)]
    scans += [scan("badnets", i, low={3: LOW}, asr=1.0) for i in range(4)]  # nor these: not clean
    assert summarise(scans).calibrations == first


def test_the_calibration_split_chooses_and_is_not_judged() -> None:
    population = summarise(known())
    changed = [*null(), *known()[12:]]
    changed[0] = scan(seed=0, low={2: 0.5})
    assert summarise(changed).calibrations != population.calibrations
    assert all(j.record.key["split"] == "test" for j in population.judged["nc"])
    assert len(population.judged["nc"]) == 11


def test_a_calibration_names_its_models() -> None:
    result = calibrate([*null(), scan(seed=20, reached=3)])
    assert (result.detector, result.preset, result.settings) == (
        "long-nc",
        "fast",
        SETTINGS,
    )
    assert result.versions == {"torch": "2.0"}
    # The one that was inconclusive taught nothing.
    assert [model.name for model in result.models] == [f"one/clean-{i}" for i in range(12)]


@pytest.mark.parametrize("seed", [12, 1000])
def test_other_settings_in_either_split_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="detector settings"):
        summarise([*null(), scan(seed=seed, settings={"steps": 1})])


@pytest.mark.parametrize("seed", [12, 1000])
def test_another_number_of_images_in_either_split_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="100, 250"):
        summarise([*null(), scan(seed=seed, images=250)])
    with pytest.raises(ValueError, match="100, 250"):
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


def test_a_page_has_tables_and_tidy_numbers() -> None:
    (page,) = study_pages(StudyRecords(tuple(ours())))
    assert [table.name for table in page.tables] == ["clean", "backdoored", "cross"]
    key = {"detector": "nc", "attack": "badnets", "setting": "one"}
    nc = {n.measure: n.value for n in page.numbers if n.key == key}
    assert [nc[name] for name in ("trained", "judged", "flagged", "named")] == [6, 5, 3, 2]
    assert (nc["flagged_low"], nc["flagged_high"]) == exact_interval(3, 5)
    assert 0 <= nc["auroc_low"] < nc["auroc"] < nc["auroc_high"] <= 1
    clean = {n.measure for n in page.numbers if n.key == key | {"attack": "clean"}}
    assert "flagged" in clean and not clean & {"named", "auroc", "paper_named"}
    with pytest.raises(ValueError, match="split"):
        calibration_page(StudyRecords(()))


def test_attack_success_comes_from_the_victim_where_the_scan_has_none() -> None:
    scans = known()
    last = scans[-1]
    del last.values["asr"]  # type: ignore[attr-defined]
    victim = {name: value for name, value in last.key.items() if name != "detector"}
    watched = {"history": {"watched": [{"asr": 0.2}, {"asr": 1.0}]}}
    records = (*scans, Record("victim", victim, {}, {}, "abc", watched, {}))
    (page,) = study_pages(StudyRecords(records))
    assert page.tables[1].rows[0][3] == "5 of 6"


def test_the_cross_table_holds_attacks_by_detectors() -> None:
    _, _, cross = population_tables(summarise([*known(), *null(detector="reverse")]))
    assert cross.headers[2:4] == ("Neural Cleanse", "Reverse generators")
    clean, badnets = cross.rows
    assert clean[2].startswith("1 of 5") and clean[3] == ABSENT
    assert badnets[2].startswith("2 of 5") and badnets[3] == badnets[4] == ABSENT


def test_beside_others_the_calibrated_pair_is_named() -> None:
    tables = population_tables(summarise([*ours(), *known(detector="bti-dbf")]))
    both = "Neural Cleanse + Reverse generators, together"
    assert tables[2].headers[2:] == ("Neural Cleanse", "Reverse generators", both, "BTI-DBF")
    for table in tables[:2]:
        assert [row[0] for row in table.rows] == list(tables[2].headers[2:])


def test_what_is_planned_is_counted_and_failures_are_named() -> None:
    scans = [*ours(), scan(seed=5, detector="bti-dbf")]
    planned = {
        "one": {"calibration": {"clean": 14}, "test": {"clean": 5, "badnets": 8}},
        "two": {"calibration": {}, "test": {"clean": 0, "blend": 3}},
    }
    values = {"planned": {"settings": planned}}
    plan = Record("study", {"study": "population"}, {}, {}, "abc", values, {})
    failures = (Failure("victim", {"attack": "sig", "seed": 3}, "no memory"),)
    page = calibration_page(StudyRecords((*scans, plan), failures))
    assert page.tables[-1].rows == (
        ("one", "calibration", "No attack (clean victim)", "12 of 14", "12 of 14", "1 of 14"),
        ("one", "test", "No attack (clean victim)", "5 of 5", "5 of 5", "0 of 5"),
        ("one", "test", "BadNets", "6 of 8", "6 of 8", "0 of 8"),
        ("two", "test", "Blend", "0 of 3", "0 of 3", "0 of 3"),
    )
    assert "victim attack=sig seed=3" in page.about


def test_recorded_scans_are_judged_by_the_calibration_that_ships(monkeypatch) -> None:
    shipped = calibrate(null())

    def load(detector: str, **given: Any) -> Calibration | None:
        assert given["settings"] == SETTINGS and given["classes"] == LABELS
        return shipped if detector != "long-bti-dbf" else None

    monkeypatch.setattr("wm_eval.population.load_calibration", load)
    stranger = scan(seed=2000)
    stranger.key["split"] = "unseen"
    scans = (*known(), *known(detector="reverse")[:-6], scan(detector="bti-dbf"), stranger)
    found = judge_shipped(StudyRecords(scans, ()))
    assert {name: len(judged) for name, judged in found.items()} == {
        "nc": 23,
        "reverse": 17,
        COMBINED: 17,
    }
    rows = shipped_table({"study": StudyRecords(scans, ())}).rows
    assert [row[1:4] for row in rows] == [
        ("Neural Cleanse", "1 of 17 (0 to 29 %)", "1"),
        ("Reverse generators", "1 of 17 (0 to 29 %)", "1"),
        ("Neural Cleanse + Reverse generators", "1 of 17 (0 to 29 %)", "1"),
    ]
    # Of five backdoored models with an ASR of 90 %: two named, a wrong label, two missed.
    assert [row[4:] for row in rows] == [("2 of 5 (5 to 85 %)", "1"), ("–", "0"), ("–", "0")]


def test_a_kind_of_network_is_judged_by_the_clean_models_of_the_others() -> None:
    kinds = ("a", "b", "c", "d")
    clean = [of_kind(kind, 3 * i + j) for i, kind in enumerate(kinds) for j in range(3)]
    # All labels of one kind lie far apart: its own clean models would hide that, the others do not.
    wide = [
        of_kind("w", i, scores=50 * torch.arange(LABELS).double().mul(2).exp()) for i in range(3)
    ]
    caught = of_kind("b", 1, "badnets", low={1: LOW}, asr=1.0)
    population = summarise([*clean, *wide, caught])
    assert list(population.calibrations) == [("nc", ANY_CLASSES)]
    assert len(population.calibrations["nc", ANY_CLASSES].models) == len(clean) + len(wide)
    judged = {id(j.record): j for j in population.judged["nc"]}
    assert len(judged) == len(clean) + len(wide) + 1
    others = [r for r in [*clean, *wide] if r.values["model"] != "b"]
    by_hand = judge(
        "long-nc",
        torch.tensor([label["score"] for label in caught.values["labels"]]).double(),
        torch.ones(LABELS).double(),
        floor=0.9,
        calibration=calibrate(others),
        subject=ModelInfo(LABELS, 16, 1, "convolutional", 100),
    )
    assert judged[id(caught)].p_value == pytest.approx(by_hand.p_value, rel=1e-6)
    assert only(population, "nc", "badnets", "b").named == (1, 1)
    assert {row.setting for row in population.rows if row.attack == "clean"} == {
        *kinds,
        "w",
        "all",
    }
    again = [replace(r, key={**r.key, "detector": "reverse"}) for r in (*clean, *wide, caught)]
    both = summarise([*clean, *wide, caught, *again]).judged[COMBINED]
    p_values = {id(j.record): j.p_value for j in both}
    assert p_values[id(caught)] < by_hand.p_value  # both say so, and have the same clean models
    few = summarise([*null(), *(of_kind("a", i) for i in range(2))])
    assert few.left_out == {("nc", ANY_CLASSES): 2} and not few.judged["nc"]
