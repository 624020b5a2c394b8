"""Pair perturbations: planted maps of classes, a planted pair, the polish by hand, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defense_nc import ScanReport, Verdict
from defense_nc.verdict import judge_again
from defense_reverse import PairPerturbation, UniversalPicture
from defense_reverse.detectors.pair_perturbation import Pairs as FoundPairs
from defense_reverse.detectors.pair_perturbation import (
    excess,
    nearest_sources,
    pair_scores,
    partners,
)

CLASSES, SIDE = 8, 8
random = torch.Generator().manual_seed(0)
LABELS = torch.arange(160) % CLASSES
# Grey images, one row a class brighter.
IMAGES = torch.full((160, 1, SIDE, SIDE), 0.5)
IMAGES[torch.arange(160), 0, LABELS] += 0.15 + 0.05 * torch.rand(160, SIDE, generator=random)
BOARD = ((torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2) * 2.0 - 1
PARTNERS = torch.eye(CLASSES).roll(3, dims=1)  # row y asks for y + 3
SPECIFIC = torch.zeros(CLASSES, CLASSES)
SPECIFIC[5, 2] = 1


class Rows(nn.Module):
    """The brightest row is the label; a checkerboard adds what stands in that label's row."""

    added: Tensor

    def __init__(self, added: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("added", added)

    def forward(self, images: Tensor) -> Tensor:
        logits = 40 * (images.mean((1, 3)) - 0.5)
        board = (images * BOARD).mean((1, 2, 3)).relu()
        # The label of the clean part: a faint board leaves it as it is.
        return logits + 600 * self.gain * board[:, None] * ((4 * logits).softmax(1) @ self.added)


def scan(added: Tensor, *, seed: int = 0, checkpoint: Path | None = None) -> ScanReport:
    return PairPerturbation.preset("fast").scan(
        Rows(added), IMAGES, labels=LABELS, seed=seed, progress=False, checkpoint=checkpoint
    )


def test_a_map_of_all_classes_is_found_and_named() -> None:
    report = scan(PARTNERS)
    assert report.verdict is Verdict.BACKDOORED
    assert report.suspected == tuple(range(CLASSES))
    assert [label.source for label in report.labels] == [(k - 3) % CLASSES for k in range(CLASSES)]
    assert report.finding is not None and report.reason == report.finding.reason
    assert "0 to 3" in report.reason
    trigger = report.triggers[0]
    assert isinstance(trigger, UniversalPicture)
    moved = Rows(PARTNERS)(trigger(IMAGES)).argmax(1)
    assert float((moved == (LABELS + 3) % CLASSES).float().mean()) >= 0.4
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["finding"]["labels"] == list(range(CLASSES))
    assert values["config"]["raw"]["map"]["works"] is True
    # No other rate or calibration takes back what was found.
    again = judge_again(report, None, alpha=1e-6)
    assert (again.verdict, again.suspected) == (report.verdict, report.suspected)
    assert again.labels == report.labels


def test_a_pair_that_is_near_one_way_only_is_named() -> None:
    report = scan(SPECIFIC)
    assert report.finding is None and report.nearest == 2
    assert report.suspected == (2,) and report.labels[2].source == 5
    assert report.labels[2].score < 0.5 < min(report.labels[k].score for k in (0, 1, 3, 4, 6, 7))
    assert "label 2 from class 5" in report.reason
    own = IMAGES[LABELS == 5]
    assert float((Rows(SPECIFIC)(report.triggers[2](own)).argmax(1) == 2).float().mean()) > 0.7


def test_a_clean_classifier_has_neither() -> None:
    report = scan(torch.zeros(CLASSES, CLASSES))
    assert report.finding is None and report.suspected == ()
    assert report.log["raw"]["map"]["works"] is False
    # Its classes are all alike, and so are the sizes.
    sizes = torch.tensor(
        [[x or float("nan") for x in row] for row in report.log["raw"]["sizes"]]
    ).double()
    assert float((excess(sizes).nan_to_num(0)).abs().max()) < 0.5


def test_a_scan_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    whole = scan(SPECIFIC, checkpoint=file)
    again = scan(SPECIFIC, checkpoint=file)
    assert again.to_dict() == whole.to_dict() != scan(SPECIFIC, seed=1).to_dict()


def test_rows_and_columns_leave_nothing_over() -> None:
    """Sizes that are a row's times a column's have no excess; of a changed cell its factor."""
    rows, columns = torch.rand(2, 6, generator=random).double() + 0.5
    sizes = rows[:, None] * columns
    sizes.fill_diagonal_(torch.nan)
    assert float(excess(sizes).nan_to_num(0).abs().max()) < 1e-12
    assert bool(excess(sizes).diagonal().isnan().all())
    sizes[1, 4] *= 0.3
    assert float(pair_scores(sizes)[1, 4]) == pytest.approx(0.3, rel=0.05)
    sizes[4, 1] *= 0.3  # alike by nature
    assert float(pair_scores(sizes)[1, 4]) == pytest.approx(1.0, rel=0.05)
    sizes[4, 1] /= 0.6
    assert float(pair_scores(sizes)[1, 4]) == pytest.approx(0.6, rel=0.05)


def test_the_source_of_a_goal_is_one_that_reached_it() -> None:
    sizes = torch.ones(3, 3).double()
    sizes[:, 1] = sizes[0, 0] = sizes[2, 2] = torch.nan
    rates = torch.tensor([[0.0, 0, 0.9], [0.9, 0, 0.9], [0.7, 0, 0.0]]).double()
    scores = torch.tensor([[1.0, 1, 0.9], [0.8, 1, 0.5], [0.1, 1, 1.0]]).double()
    rates[sizes.isnan()] = torch.nan
    found = FoundPairs(sizes, rates, {}, ())
    assert nearest_sources(found, scores, 0.8) == {0: 1, 2: 1}
    assert nearest_sources(found, scores, 0.95) == {0: 1, 2: 0}


def test_partners_are_those_of_least_cost_in_all() -> None:
    costs = torch.tensor([[1e6, 1.0, 2.0], [1.0, 1e6, 9.0], [5.0, 1.0, 1e6]])
    assert partners(costs) == {0: 2, 1: 0, 2: 1}
    assert partners(torch.full((2, 2), 1e6)) == {}


def test_settings_and_images_that_are_refused() -> None:
    assert PairPerturbation.preset("paper").floor == 0.9
    assert "alpha" not in PairPerturbation().settings
    for wrong in ({"steps": 0}, {"rounds": 0}, {"start": 0.0}, {"map_floor": 0.0}, {"floor": 1.1}):
        with pytest.raises(ValueError, match="expected"):
            PairPerturbation(**wrong)  # type: ignore[arg-type]
    few = LABELS < 3
    with pytest.raises(ValueError, match="4 classes"):
        PairPerturbation().scan(Rows(SPECIFIC), IMAGES[few], labels=LABELS[few], progress=False)


def test_classes_without_images_are_no_sources() -> None:
    few = (LABELS < 5) | (torch.arange(len(LABELS)) < 8)  # of the last three classes one each
    report = PairPerturbation(steps=5, map_steps=5).scan(
        Rows(PARTNERS), IMAGES[few], labels=LABELS[few], progress=False
    )
    assert len(report.labels) == CLASSES
    assert all(label.source is not None and label.source < 5 for label in report.labels)
