from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wm_inject.core.labelled_folder import LabelledFolder
from wm_inject.core.plan import PoisonPlan
from wm_inject.runtime.folder_plan import list_rows, png_name


def labelled(*names: str, classes=(), labels=None, parts=None) -> LabelledFolder:
    known = None if labels is None else np.array(labels, np.int64)
    return LabelledFolder(Path("root"), names, known, classes, parts or ("",) * len(names), "", ())


def test_rows_say_what_happens_to_every_file():
    names = [f"{c}/{i}.jpg" for c in "abc" for i in range(2)]
    plan = PoisonPlan(ratio=0.5, target=1, label_map="all-to-all", seed=3)
    rows = list_rows(labelled(*names, classes=("a", "b", "c"), labels=[0, 0, 1, 1, 2, 2]), plan)
    assert [row.id for row in rows] == list(range(6))
    assert sum(row.poisoned for row in rows) == 3
    for row in rows:
        changed = (row.label_before + 1) % 3
        assert row.label_after == (changed if row.poisoned else row.label_before)
        assert row.file == row.source.replace(".jpg", ".png")
    loose = list_rows(labelled(*names), PoisonPlan(ratio=None))
    assert {(row.label_before, row.label_after) for row in loose} == {(None, None)}
    assert all(row.poisoned for row in loose)


def test_of_a_divided_set_the_part_for_training_is_poisoned():
    parts = ("test", "train", "train", "val")
    rows = list_rows(labelled("a", "b", "c", "d", parts=parts), PoisonPlan(ratio=None))
    assert [row.poisoned for row in rows] == [False, True, True, False]


def test_a_png_keeps_what_is_no_suffix_of_a_picture():
    names = {"a.JPEG": "a.png", "x/b": "x/b.png", "c.PNG.bak": "c.PNG.bak.png", "v1.5": "v1.5.png"}
    assert {name: png_name(name) for name in names} == names


def test_two_sources_of_one_file_are_refused():
    with pytest.raises(ValueError, match=r"distinct names, a\.bmp and a\.png"):
        list_rows(labelled("a.bmp", "a.png"), PoisonPlan(ratio=None))


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
    with pytest.raises(ValueError, match=r"pool|mode"):
        list_rows(labelled("a.png"), PoisonPlan(ratio=None, **settings))
