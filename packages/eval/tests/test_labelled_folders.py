"""The same folder gives the same labels in every command, and none leaves anything out unsaid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from folder_layouts import LAYOUTS, SIDE, Layout

from wm_eval.audit import images as audit_images
from wm_eval.audit.images import read_clean
from wm_eval.audit.inspect import inspect_folder
from wm_inject import load_image
from wm_inject.core.image_files import find_images
from wm_inject.core.labelled_folder import read_labelled_folder
from wm_inject.core.plan import PoisonPlan
from wm_inject.runtime import Scan, Scanner
from wm_inject.runtime.folder import poison_files
from wm_victim import load_dataset


class Blind(Scanner):
    """A scanner that flags nothing."""

    def __init__(self) -> None:
        self.detectors, self.channels, self.size = {}, 3, [SIDE, SIDE]

    def __call__(self, pixels):
        return Scan(np.zeros(len(pixels), bool), {}, {})


def as_read(names, labels, classes) -> dict[str, str]:
    return {name: classes[label] for name, label in zip(names, labels.tolist(), strict=True)}


def scan(folder: Path, layout: Layout) -> dict[str, str] | None:
    clean = read_clean(folder, size=SIDE, channels=3)
    if clean.labels is None:
        assert clean.classes is None
        return None
    assert clean.source is not None
    return as_read(clean.files, clean.labels, clean.source.classes)


def train(folder: Path, layout: Layout) -> dict[str, str] | None:
    data = load_dataset(folder, image_size=SIDE)
    assert data.source is not None and data.source.labels is not None
    # Which images these are is read from the images themselves.
    names = {int(load_image(folder / name)[0, 0, 0]): name for name in data.source.names}
    read: dict[str, str] = {}
    for part, images in (("train", data.train), ("test", data.test)):
        values = images.images[:, 0, 0, 0].mul(255).round().int().tolist()
        for value, label in zip(values, images.labels.tolist(), strict=True):
            name = names[value]
            read[name] = data.classes[label]
            if {"test", "val"} & set(map(layout.part, data.source.names)):
                assert (layout.part(name) in ("test", "val")) == (part == "test"), name
    return read


def poison(folder: Path, layout: Layout) -> dict[str, str] | None:
    out = folder.parent / "out"
    plan = PoisonPlan(ratio=None, target=0)
    settings = {"size": SIDE, "channels": 3, "plan": plan, "progress": False}
    result = poison_files(lambda pixels, *, ids, target: pixels, folder, out, **settings)
    plan_file = json.loads((out / "plan.json").read_text())
    rows, classes = plan_file["images"], plan_file["classes"]
    assert result.poisoned == sum(row["poisoned"] for row in rows)
    if any(layout.part(row["source"]) == "train" for row in rows):
        assert all(row["poisoned"] == (layout.part(row["source"]) == "train") for row in rows)
    if classes is None:
        return None
    # What was written is read again as it was meant, a class without images included.
    again = read_labelled_folder(out)
    labels = {row["file"]: classes[row["label_after"]] for row in rows}
    assert as_read(again.names, again.labels, again.classes) == labels
    assert again.classes[: len(classes)] == tuple(classes)[: len(again.classes)]
    return {row["source"]: classes[row["label_before"]] for row in rows}


def detect(folder: Path, layout: Layout) -> set[str]:
    rows = list(Blind().folder(folder, batch_size=5))
    assert all(row.error is None for row in rows)
    return {row.file for row in rows}


def inspect(folder: Path, layout: Layout) -> set[str]:
    return {row.file for row in inspect_folder(folder, [])[1]}


def images_of(layout: Layout) -> set[str]:
    """Names as they are below the folder, where links lead to some."""
    assert not isinstance(layout.labels, str)
    names = set(layout.labels or ())
    return names | {name for name in layout.images if not name.startswith("../")}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(audit_images, "MIN_IMAGES", 1)
    monkeypatch.setattr("wm_eval.audit.inspect.Scanner", lambda *paths, providers: Blind())


def test_there_are_enough_of_them():
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_command_reads_a_folder_alike(name, tmp_path):
    layout = LAYOUTS[name]
    folder = layout.make(tmp_path)
    if isinstance(layout.labels, str):
        for command in (scan, train, poison):
            with pytest.raises(ValueError) as refused:
                command(folder, layout)
            message = str(refused.value)
            assert layout.labels in message and "\n" not in message
        assert not (tmp_path / "out" / "plan.json").exists()
        return
    source = read_labelled_folder(folder)
    assert {file for file, _ in source.left_out} == set(layout.left_out)
    lines = "\n".join(source.lines())
    assert len(source.lines()) == 1 + bool(layout.left_out) and source.layout in lines
    assert all(reason in lines for _, reason in source.left_out)
    for command in (scan, poison):
        assert command(folder, layout) == layout.labels, command
    if layout.labels is None:
        with pytest.raises(ValueError, match="expected labels"):
            train(folder, layout)
    else:
        skipped = "val" if "test" in map(layout.part, layout.labels) else None
        labels = {n: label for n, label in layout.labels.items() if layout.part(n) != skipped}
        assert train(folder, layout) == labels
        assert source.classes == (layout.classes or tuple(sorted(set(layout.labels.values()))))
    assert [source.parts[k] for k in range(len(source.names))] == list(
        map(layout.part, source.names)
    )
    # The commands that ask for no labels see every image, those without a label included.
    files = find_images(folder)
    assert detect(folder, layout) == inspect(folder, layout) == images_of(layout)
    unused = {file for file, _ in files.left_out}
    there = {name for name in layout.left_out if (folder / name).exists()}
    assert unused >= there - images_of(layout)


def test_numbers_without_images_are_counted_and_not_listed(tmp_path):
    for name in ("0", "180"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    (line,) = read_labelled_folder(tmp_path).lines()
    assert line.endswith("2 images of 2 classes (0 1, 180 1; 179 of the numbers between have none)")
