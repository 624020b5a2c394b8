"""The verdict: which figures lead to which answer, and how it is told."""

import json
import math
from dataclasses import replace

import pytest
import torch

from defense_nc import Finding, InvertedTrigger, NeuralCleanse, Verdict, judge
from defense_nc.verdict import (
    ModelInfo,
    combine,
    foreseen_abstention,
    judge_again,
    load_calibration,
)

CLEAN = [41.0, 50, 62, 70, 84, 66, 75, 58, 80]


def told(scores, rates=None, **changes):
    scores = torch.tensor(scores)
    rates = torch.ones(len(scores)) if rates is None else torch.tensor(rates)
    return judge("test", scores, rates, **{"floor": 0.9, **changes})


def test_exit_codes():
    assert [verdict.exit_code for verdict in Verdict] == [0, 1, 2, 3]
    assert [verdict.value for verdict in Verdict] == [
        "clean",
        "backdoored",
        "inconclusive",
        "not-scanned",
    ]


def test_backdoored():
    report = told([*CLEAN, 8.0])
    assert report.verdict is Verdict.BACKDOORED
    assert report.suspected == (9,)
    assert report.p_value == report.labels[9].p_value <= 0.05
    assert report.labels[9].ratio == pytest.approx(8 / 64)
    assert "label 9" in report.reason and "0.12" in report.reason


def test_clean():
    report = told([*CLEAN, 45.0])
    assert report.verdict is Verdict.CLEAN
    assert report.suspected == ()
    assert "label 0" in report.reason


def test_a_label_that_was_not_reached_is_neither_suspected_nor_compared():
    report = told([*CLEAN, 8.0], [*[1.0] * 9, 0.5])
    assert report.verdict is Verdict.CLEAN
    assert not report.labels[9].converged
    assert report.labels[9].p_value == 1
    assert "1 of 10 labels were never reached" in report.reason
    # The papers' rule asks for no such floor.
    assert report.paper_flagged == (9,)


def test_the_floor_itself_counts_as_reached():
    assert told([*CLEAN, 8.0], [0.9] * 10).suspected == (9,)


def test_too_few_labels_reached():
    report = told([*CLEAN, 8.0], [1.0] * 3 + [0.0] * 7)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "Only 3 of 10" in report.reason
    assert told([5.0, 1.0]).verdict is Verdict.INCONCLUSIVE
    assert told([5.0, 1.0, 4.0], [0.0] * 3).verdict is Verdict.INCONCLUSIVE


def test_significant_but_not_far_below():
    report = told([100.0, 101, 103, 104, 106, 108, 110, 112, 117, 70])
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "label 9" in report.reason.lower()


def test_both_medians_are_always_there():
    report = told([10.0, 20, 30, 40, 50, 60, 70, 80, 90, 5])
    assert report.paper_index == pytest.approx(1.0792, abs=1e-4)
    assert report.paper_index_low == pytest.approx(1.1804, abs=1e-4)


def test_a_finding_decides_whatever_the_scores_are():
    finding = Finding((1, 2), "Seen by another rule.")
    for more in ({}, {"starved": [0.9] * 10}, {"rates": [0.0] * 10}):
        report = told([*CLEAN, 8.0], finding=finding, **more)
        assert report.verdict is Verdict.BACKDOORED and report.suspected == (1, 2)
        assert report.reason == finding.reason
        assert judge_again(report, None).suspected == (1, 2)
        assert report.to_dict()["finding"] == {"labels": [1, 2], "reason": finding.reason}


def test_scores_of_one_class_name_it():
    sources = [None, *range(9)]
    report = told([*CLEAN, 8.0], sources=sources)
    assert [label.source for label in report.labels] == sources
    assert report.suspected == (9,) and "label 9 from class 8" in report.reason
    assert [row.get("source") for row in report.to_dict()["labels"]] == sources
    clean = told([*CLEAN, 45.0], sources=[*range(1, 10), 0])
    assert "from class 1" in clean.reason and "were not looked for" not in clean.reason


def test_to_dict_is_json_without_triggers():
    trigger = InvertedTrigger(torch.zeros(1, 4, 4), torch.zeros(3, 4, 4))
    report = told([5.0, 5, 5, 5, 1], triggers={4: trigger}, config={"steps": 3}, seed=7)
    assert report.paper_index == math.inf
    out = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert out["verdict"] == "backdoored"
    assert out["paper_index"] is None
    assert out["suspected"] == [4]
    assert out["labels"][4]["score"] == 1
    assert (out["seed"], out["config"]) == (7, {"steps": 3})
    assert "triggers" not in out
    assert report.triggers[4] is trigger


ONES = torch.ones(5)


def test_a_score_of_the_whole_model_is_in_the_record():
    report = told([*CLEAN, 8.0])
    assert "model_score" not in report.to_dict()
    assert replace(report, model_score=math.inf).to_dict()["model_score"] is None


def test_refusals(subtests):
    for scores, rates, settings in [
        ([1.0] * 5, ONES, {}),
        (torch.ones(5, dtype=torch.int64), ONES, {}),
        (ONES, torch.ones(4), {}),
        (torch.ones(1), torch.ones(1), {}),
        (torch.ones(0), torch.ones(0), {}),
        (-ONES, ONES, {}),
        (ONES * math.nan, ONES, {}),
        (ONES, ONES * 1.5, {}),
        (ONES, ONES, {"floor": 1.5}),
        (ONES, ONES, {"alpha": 0.0}),
        (ONES, ONES, {"max_ratio": 0.0}),
    ]:
        with (
            subtests.test(scores=scores, rates=rates, settings=settings),
            pytest.raises(ValueError, match="expected"),
        ):
            judge("test", scores, rates, **{"floor": 0.9, **settings})


def test_half_of_the_labels_must_be_reached() -> None:
    scores = torch.tensor([10.0, 11, 12, 13, 10, 11, 12, 13, 10, 11])
    rates = torch.tensor([1.0] * 4 + [0.0] * 6)
    report = judge("nc", scores, rates, floor=0.9)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "needs 5" in report.reason


def test_a_label_whose_trigger_does_not_work_is_not_suspected(calibration) -> None:
    scores = torch.linspace(90, 110, 10, dtype=torch.float64)
    scores[[2, 7]] = 0.1
    rates = torch.zeros(10).double()
    rates[[2, 7]] = torch.tensor([0.7, 0.8]).double()
    report = judge("nc", scores, rates, floor=0.0, works=0.75, calibration=calibration)
    assert report.suspected == (7,) and report.labels[2].p_value == 1
    for again in (judge_again(report, calibration), combine([report, report])):
        assert again.suspected == (7,) and again.works == 0.75
    none = judge("nc", scores, rates, floor=0.0, works=0.9, calibration=calibration)
    assert none.suspected == () and none.p_value == 1


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (ModelInfo(10, 32, 3, "convolutional", 500), None),
        (ModelInfo(10, 224, 3, "convolutional", 500), "pixels a side"),
        (ModelInfo(1000, 32, 3, "convolutional", 500), "classes"),
        (ModelInfo(3, 32, 3, "convolutional", 500), "classes"),
        (ModelInfo(10, 32, 3, "other", 500), "neither convolutional"),
    ],
)
def test_an_abstention_that_is_foreseen_is_that_of_the_verdict(
    subject: ModelInfo, reason: str | None
) -> None:
    settings = NeuralCleanse().settings
    foreseen = foreseen_abstention("neural-cleanse", subject, settings=settings)
    scores = torch.linspace(90, 110, subject.classes, dtype=torch.float64)
    calibration = load_calibration("neural-cleanse", settings=settings, classes=subject.classes)
    report = judge(
        "neural-cleanse",
        *(scores, torch.ones_like(scores)),
        floor=0.9,
        calibration=calibration,
        subject=subject,
    )
    if reason is None:
        assert foreseen is None and report.verdict is not Verdict.INCONCLUSIVE
    else:
        assert foreseen is not None and reason in foreseen
        assert report.verdict is Verdict.INCONCLUSIVE and foreseen in report.reason
