from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from wm_inject.core.plan import PoisonPlan
from wm_inject.runtime.folder_plan import FolderPlan, list_rows, read_labels

N, K = 60, 5
LABELS = np.arange(N, dtype=np.int64) % K
KINDS = [
    {"label_map": "all-to-one"},
    {"label_map": "all-to-all"},
    {"label_map": "all-to-one", "pool": "non_target"},
    {"label_map": "all-to-all", "pool": "non_target"},
    {"label_map": "clean-label", "pool": "target"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.11, 0.125, 0.2, 0.5, 0.99, 1.0])
def test_it_counts_labels_and_refuses_as_poison_plan_does(kind, ratio):
    plan = FolderPlan(ratio=ratio, target=2, **kind)
    other = PoisonPlan(ratio=ratio, target=2, **kind)
    labels = torch.from_numpy(LABELS)
    try:
        wanted = other.choose(labels)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            plan.choose(N, LABELS)
        assert str(caught.value) == str(error)
    else:
        mask = plan.choose(N, LABELS)
        assert mask.dtype == np.bool_ and int(mask.sum()) == int(wanted.sum())
        assert bool(other.eligible(labels)[torch.from_numpy(mask)].all())
    assert plan.relabel(LABELS, K).tolist() == other.relabel(labels, K).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.0},
        {"ratio": 1.1},
        {"ratio": float("nan")},
        {"target": -1},
        {"label_map": "nothing"},
        {"pool": "nothing"},
        {"label_map": "clean-label"},
        {"pool": "target"},
    ],
)
def test_bad_settings_are_refused_in_the_words_of_poison_plan(settings):
    with pytest.raises(ValueError) as wanted:
        PoisonPlan(**settings)
    with pytest.raises(ValueError) as caught:
        FolderPlan(**settings)
    assert str(caught.value) == str(wanted.value)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed >= 0"):
        FolderPlan(seed=-1)


def test_without_a_ratio_the_whole_pool_is_chosen():
    assert FolderPlan().choose(N).all()
    assert FolderPlan(pool="non_target").choose(N, LABELS).tolist() == (LABELS != 0).tolist()
    clean = FolderPlan(label_map="clean-label", pool="target", target=3)
    assert clean.choose(N, LABELS).tolist() == (LABELS == 3).tolist()
    with pytest.raises(ValueError, match="label 9 holds 0"):
        FolderPlan(label_map="clean-label", pool="target", target=9).choose(N, LABELS)


def test_the_draw_is_the_seeds_and_known():
    first = FolderPlan(ratio=0.1, seed=1).choose(N)
    assert np.array_equal(first, FolderPlan(ratio=0.1, seed=1).choose(N, LABELS))
    assert not np.array_equal(first, FolderPlan(ratio=0.1, seed=2).choose(N))
    assert np.flatnonzero(first).tolist() == [24, 25, 27, 31, 44, 58]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_labels_are_asked_for_where_a_plan_needs_them(kind):
    with pytest.raises(ValueError, match="expected a folder of class folders"):
        FolderPlan(**kind).choose(N)


def test_labels_of_another_length_and_no_files_are_refused():
    with pytest.raises(ValueError, match="a label for each"):
        FolderPlan().choose(N, LABELS[:3])
    with pytest.raises(ValueError, match="at least one file"):
        FolderPlan().choose(0)
    with pytest.raises(ValueError, match="below 5 classes, got 5"):
        FolderPlan(target=5).relabel(LABELS, K)


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["dog/a.png", "cat/b.png", "cat/x/c.png"], ("cat", "dog"), [1, 0, 0]),
        (["10/a.png", "2/b.png"], tuple(map(str, range(11))), [10, 2]),
        (["a/1.png", "2/2.png"], ("2", "a"), [1, 0]),
    ],
)
def test_class_folders_are_numbered(names, classes, labels):
    root = Path("root")
    known = read_labels(root, [root / name for name in names])
    assert known is not None and known.classes == classes
    assert known.labels.dtype == np.int64 and known.labels.tolist() == labels


def test_loose_images_have_no_labels():
    root = Path("root")
    assert read_labels(root, [root / "a.png", root / "cat" / "b.png"]) is None


def test_rows_say_what_happens_to_every_file():
    root = Path("root")
    files = [root / f"{c}" / f"{i}.jpg" for c in "abc" for i in range(2)]
    plan = FolderPlan(ratio=0.5, target=1, label_map="all-to-all", seed=3)
    rows = list_rows(root, files, read_labels(root, files), plan)
    assert [row.id for row in rows] == list(range(6))
    assert sum(row.poisoned for row in rows) == 3
    for row in rows:
        changed = (row.label_before + 1) % 3
        assert row.label_after == (changed if row.poisoned else row.label_before)
        assert row.file == row.source.replace(".jpg", ".png")
    loose = list_rows(root, files, None, FolderPlan())
    assert {(row.label_before, row.label_after) for row in loose} == {(None, None)}
    assert all(row.poisoned for row in loose)


def test_two_sources_of_one_file_are_refused():
    root = Path("root")
    with pytest.raises(ValueError, match=r"distinct names, a\.bmp and a\.png"):
        list_rows(root, [root / "a.bmp", root / "a.png"], None, FolderPlan())


def test_its_settings_are_json():
    assert asdict(FolderPlan()) == {
        "ratio": None,
        "target": 0,
        "label_map": "all-to-one",
        "pool": "all",
        "seed": 0,
    }
