from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wm_inject.core.plan import PoisonPlan
from wm_inject.runtime.folder_plan import list_rows, read_labels


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
    plan = PoisonPlan(ratio=0.5, target=1, label_map="all-to-all", seed=3)
    rows = list_rows(root, files, read_labels(root, files), plan)
    assert [row.id for row in rows] == list(range(6))
    assert sum(row.poisoned for row in rows) == 3
    for row in rows:
        changed = (row.label_before + 1) % 3
        assert row.label_after == (changed if row.poisoned else row.label_before)
        assert row.file == row.source.replace(".jpg", ".png")
    loose = list_rows(root, files, None, PoisonPlan(ratio=None))
    assert {(row.label_before, row.label_after) for row in loose} == {(None, None)}
    assert all(row.poisoned for row in loose)


def test_two_sources_of_one_file_are_refused():
    root = Path("root")
    with pytest.raises(ValueError, match=r"distinct names, a\.bmp and a\.png"):
        list_rows(root, [root / "a.bmp", root / "a.png"], None, PoisonPlan(ratio=None))


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "non_target"},
        {"label_map": "all-to-all"},
        {"label_map": "clean-label", "pool": "target"},
        {"mode": "per_batch"},
    ],
)
def test_plans_that_need_labels_or_batches_do_not_fit_loose_files(settings):
    root = Path("root")
    with pytest.raises(ValueError, match=r"pool|mode"):
        list_rows(root, [root / "a.png"], None, PoisonPlan(ratio=None, **settings))
