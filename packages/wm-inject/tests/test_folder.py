from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wm_inject.core.images import load_image, save_image
from wm_inject.core.plan import PoisonPlan
from wm_inject.runtime.folder import common_side, poison_files

SIZE = 8
SETTINGS = {"size": SIZE, "channels": 3, "progress": False}
PER_CLASS = 4


@pytest.fixture
def source(tmp_path):
    """Twelve images in the class folders ant, bee and cow."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 10, 3), dtype=np.uint8)
    for place, image in enumerate(pixels):
        name = ("ant", "bee", "cow")[place // PER_CLASS]
        save_image(tmp_path / "in" / name / f"{place:02}.png", image)
    return tmp_path / "in"


class Marker:
    """Write the id and the target of every image into its first pixel, and note the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, pixels, *, ids, target):
        assert (
            ids.dtype == target.dtype == np.int64 and ids.shape == target.shape == pixels.shape[:1]
        )
        self.batches.append(ids.tolist())
        out = pixels.copy()
        out[:, 0, 0, 0], out[:, 0, 0, 1] = ids, target + 100
        return out


def content(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_plan(folder) -> dict:
    return json.loads((folder / "plan.json").read_text())


def test_chosen_files_are_poisoned_and_the_others_only_stored_again(source, tmp_path):
    out, plan = tmp_path / "out", PoisonPlan(ratio=0.5, target=1, seed=5)
    done = poison_files(Marker(), source, out, plan=plan, batch_size=4, **SETTINGS)
    assert done[:3] == (12, 6, 12)
    listed = read_plan(out)
    assert listed["classes"] == ["ant", "bee", "cow"] and listed["format"] == "wm-folder-1"
    assert listed["plan"]["ratio"] == 0.5 and listed["image_size"] == SIZE
    for place, row in enumerate(listed["images"]):
        before = place // PER_CLASS
        assert (row["id"], row["label_before"]) == (place, before)
        assert row["label_after"] == (1 if row["poisoned"] else before)
        wanted = load_image(source / row["source"], size=SIZE)
        if row["poisoned"]:
            wanted = wanted.copy()
            wanted[0, 0, :2] = place, 101
        assert np.array_equal(load_image(out / row["file"]), wanted)
    assert len(list(out.rglob("*.png"))) == 12


def test_labels_csv_names_the_classes_after_poisoning(source, tmp_path):
    plan = PoisonPlan(ratio=0.25, target=2, pool="non_target", seed=1)
    poison_files(Marker(), source, tmp_path / "out", plan=plan, **SETTINGS)
    with (tmp_path / "out" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    listed = read_plan(tmp_path / "out")["images"]
    names = ("ant", "bee", "cow")
    assert [(row["file"], row["label"]) for row in rows] == [
        (row["file"], names[row["label_after"]]) for row in listed
    ]
    assert sum(row["poisoned"] for row in listed) == round(0.25 * 8)


@pytest.mark.parametrize(
    ("plan", "targets"),
    [
        (PoisonPlan(ratio=None, target=2), [2] * 12),
        (PoisonPlan(ratio=None, label_map="all-to-all"), [1] * 4 + [2] * 4 + [0] * 4),
        (PoisonPlan(ratio=None, label_map="clean-label", pool="target", target=1), [1] * 4),
    ],
)
def test_the_trigger_is_told_the_label_after(source, tmp_path, plan, targets):
    poison_files(Marker(), source, tmp_path / "out", plan=plan, **SETTINGS)
    rows = [row for row in read_plan(tmp_path / "out")["images"] if row["poisoned"]]
    told = [load_image(tmp_path / "out" / row["file"])[0, 0, 1] - 100 for row in rows]
    assert told == targets == [row["label_after"] for row in rows]


def test_loose_images_get_the_target_and_no_labels(source, tmp_path):
    out = tmp_path / "out"
    poison_files(Marker(), source / "bee", out, plan=PoisonPlan(ratio=None, target=7), **SETTINGS)
    listed = read_plan(out)
    assert listed["classes"] is None and not (out / "labels.csv").exists()
    assert {(row["label_before"], row["label_after"]) for row in listed["images"]} == {(None, None)}
    assert load_image(out / "04.png")[0, 0, :2].tolist() == [0, 107]


def test_the_plan_is_there_before_the_first_image(source, tmp_path):
    def stop(pixels, *, ids, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        poison_files(stop, source, tmp_path / "out", **SETTINGS)
    assert set(content(tmp_path / "out")) == {"plan.json", "labels.csv"}


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(source, tmp_path):
    plan = PoisonPlan(ratio=0.75)
    settings = {"plan": plan, "batch_size": 4, **SETTINGS}
    poison_files(Marker(), source, tmp_path / "whole", **settings)

    class Stopping(Marker):
        def __call__(self, pixels, *, ids, target):
            if len(self.batches) == 1:
                raise KeyboardInterrupt
            return super().__call__(pixels, ids=ids, target=target)

    out, first = tmp_path / "out", Stopping()
    with pytest.raises(KeyboardInterrupt):
        poison_files(first, source, out, **settings)
    # One file of the batch that was done is lost as well: its whole batch is computed again.
    (out / read_plan(out)["images"][first.batches[0][1]]["file"]).unlink()
    second = Marker()
    assert poison_files(second, source, out, **settings)[:3] == (12, 9, 12 - 3)
    assert second.batches[0] == first.batches[0]
    assert content(out) == content(tmp_path / "whole")
    third = Marker()
    assert poison_files(third, source, out, **settings)[:3] == (12, 9, 0)
    assert third.batches == []


KILLED = """
import os, signal, sys
import wm_inject.runtime.folder as folder
from wm_inject.core.plan import PoisonPlan

done, save = 0, folder.save_image

def dying(path, pixels):
    global done
    if done == 5:
        path.with_name(f".{path.stem}.part{os.getpid()}.png").write_bytes(b"half an im")
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    save(path, pixels)

folder.save_image = dying
folder.poison_files(
    lambda pixels, *, ids, target: 255 - pixels, sys.argv[1], sys.argv[2],
    size=8, channels=3, plan=PoisonPlan(ratio=0.5), batch_size=3, progress=False,
)
"""


def test_a_killed_process_leaves_whole_files_only_and_is_taken_up(source, tmp_path):
    def invert(pixels, *, ids, target):
        return 255 - pixels

    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    left = [path for path in out.rglob("*.png") if not path.name.startswith(".")]
    # Two threads write: the other one may have been in the middle of the fifth.
    assert len(left) in (4, 5) and list(out.rglob(".*.part*"))
    settings = {"plan": PoisonPlan(ratio=0.5), "batch_size": 3, **SETTINGS}
    assert poison_files(invert, source, out, **settings).written == 12 - len(left)
    poison_files(invert, source, tmp_path / "whole", **settings)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"plan": PoisonPlan(ratio=0.5, seed=1)}, "different: images, plan"),
        ({"record": {"trigger": {"kind": "other"}}}, "different: trigger"),
        ({"size": 9}, "different: image_size"),
        ({"channels": 1}, "different: channels"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(source, tmp_path, change, told):
    settings = {"plan": PoisonPlan(ratio=0.5), "record": {"trigger": {"kind": "one"}}, **SETTINGS}
    poison_files(Marker(), source, tmp_path / "out", **settings)
    before = content(tmp_path / "out")
    with pytest.raises(ValueError) as caught:
        poison_files(Marker(), source, tmp_path / "out", **(settings | change))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert content(tmp_path / "out") == before


def test_a_run_that_failed_before_its_first_image_binds_nobody(source, tmp_path):
    def fail(pixels, *, ids, target):
        raise ValueError("expected another target")

    with pytest.raises(ValueError, match="another target"):
        poison_files(
            fail, source, tmp_path / "out", plan=PoisonPlan(ratio=None, target=2), **SETTINGS
        )
    assert read_plan(tmp_path / "out")["plan"]["target"] == 2
    poison_files(
        Marker(), source, tmp_path / "out", plan=PoisonPlan(ratio=None, target=1), **SETTINGS
    )
    assert read_plan(tmp_path / "out")["plan"]["target"] == 1


def test_other_images_are_another_run(source, tmp_path):
    poison_files(Marker(), source, tmp_path / "out", **SETTINGS)
    (source / "cow" / "11.png").unlink()
    with pytest.raises(ValueError, match="different: images"):
        poison_files(Marker(), source, tmp_path / "out", **SETTINGS)


def test_a_damaged_plan_is_refused(source, tmp_path, subtests):
    for text in ["{", "[]", '"plan"', "\x00", '{"images": [{}]}', '{"images": 1}']:
        with subtests.test(text=text):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "plan.json").write_text(text)
            with pytest.raises(ValueError, match="is damaged"):
                poison_files(Marker(), source, tmp_path / "out", **SETTINGS)


def test_files_of_unknown_origin_are_not_taken_for_done(source, tmp_path):
    save_image(tmp_path / "out" / "bee" / "05.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected a new folder, .* holds bee/05\.png"):
        poison_files(Marker(), source, tmp_path / "out", **SETTINGS)
    assert list(content(tmp_path / "out")) == ["bee/05.png"]


@pytest.mark.parametrize("out", ["in", "in/deep"])
def test_an_output_folder_inside_the_source_is_refused(source, tmp_path, out):
    with pytest.raises(ValueError, match="output folder outside"):
        poison_files(Marker(), source, tmp_path / out, **SETTINGS)


def test_what_does_not_fit_is_refused(source, tmp_path, subtests):
    for change, told in [
        ({"batch_size": 0}, "batch size"),
        ({"size": 0}, "image side"),
        ({"channels": 2}, "channels 1 or 3"),
        ({"plan": PoisonPlan(ratio=None, target=3)}, "below 3 classes"),
        ({"plan": PoisonPlan(ratio=0.01)}, "asks for 0 of 12"),
    ]:
        with subtests.test(change=change, told=told):
            with pytest.raises(ValueError, match=told):
                poison_files(Marker(), source, tmp_path / "out", **(SETTINGS | change))
            assert not list(tmp_path.rglob("out/**/*.png"))


def test_a_folder_without_class_folders_has_no_classes_to_choose_by(source, tmp_path):
    plan = PoisonPlan(ratio=None, label_map="clean-label", pool="target")
    with pytest.raises(ValueError, match="class folders"):
        poison_files(Marker(), source / "bee", tmp_path / "out", plan=plan, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_all_unreadable_images_are_named_and_may_be_skipped(source, tmp_path):
    for name in ("ant/00a.png", "bee/broken.png", "cow/11b.png"):
        (source / name).write_text("no image")
    out = tmp_path / "out"
    settings = {"plan": PoisonPlan(ratio=None, target=1), "batch_size": 4, **SETTINGS}
    with pytest.raises(ValueError, match="cannot read 3 of 15 images") as refused:
        poison_files(Marker(), source, out, **settings)
    message = str(refused.value)
    assert "ant/00a.png" in message and "--skip-unreadable" in message and "\n" not in message
    # The others are there, and are not made again.
    result = poison_files(Marker(), source, out, skip_unreadable=True, **settings)
    assert result[:3] == (12, 12, 0) and [file for file, _ in result.unread] == [
        "ant/00a.png",
        "bee/broken.png",
        "cow/11b.png",
    ]
    assert [row["file"] for row in read_plan(out)["unread"]] == [file for file, _ in result.unread]
    with (out / "labels.csv").open(newline="") as file:
        names = {row["file"] for row in csv.DictReader(file)}
    assert names == {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    # One that is mended is taken up.
    save_image(source / "bee" / "broken.png", np.zeros((4, 4, 3), np.uint8))
    result = poison_files(Marker(), source, out, skip_unreadable=True, **settings)
    assert result[:3] == (13, 13, 1) and len(read_plan(out)["unread"]) == 2


def test_a_folder_of_nothing_but_damaged_files_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot read 1 of 1 images"):
        poison_files(Marker(), tmp_path / "in", tmp_path / "out", skip_unreadable=True, **SETTINGS)


def test_two_files_of_one_name_are_refused(source, tmp_path):
    Image.new("RGB", (8, 8)).save(source / "bee" / "05.bmp")
    with pytest.raises(ValueError, match="distinct names"):
        poison_files(Marker(), source, tmp_path / "out", **SETTINGS)


def test_progress_is_a_line_where_there_is_no_terminal(source, tmp_path, monkeypatch, capsys):
    import wm_inject.runtime.folder as folder

    usual = folder.show_progress
    monkeypatch.setattr(folder, "show_progress", lambda **settings: usual(**settings, interval=0.0))
    poison_files(Marker(), source, tmp_path / "out", **(SETTINGS | {"progress": True}))
    assert capsys.readouterr().err.splitlines()[-1].startswith("poisoning 12/12")


def test_the_common_side_of_a_folder(source):
    assert common_side(source) == 10
    Image.new("RGB", (12, 12)).save(source / "bee" / "z.bmp")
    with pytest.raises(ValueError, match=r"expected --image-size.*00\.png 10 x 10 and .*z\.bmp 12"):
        common_side(source)


def test_images_that_are_not_square_have_no_common_side(tmp_path):
    Image.new("RGB", (12, 10)).save(tmp_path / "a.bmp")
    with pytest.raises(ValueError, match=r"expected --image-size.*a\.bmp 12 x 10"):
        common_side(tmp_path)
    (tmp_path / "a.bmp").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read 1 of 1 .*a\.bmp"):
        common_side(tmp_path)
