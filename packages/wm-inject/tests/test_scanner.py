from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from wm_inject.cli import main
from wm_inject.core.images import save_image, to_float
from wm_inject.export import to_onnx
from wm_inject.runtime import Detector, Extractor, Scanner, providers_for

SIZE = 8


class Bright(nn.Module):
    """Scores an image by how bright it is; the map is the image in grey."""

    __module__ = "tiny"

    def __init__(self, *, maps: bool) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images):
        score = images.mean(dim=(1, 2, 3))
        return (score, images.mean(dim=1, keepdim=True)) if self.maps else score


def write(path, *, maps=False, uint8=True, size=SIZE, **changes):
    found = {"threshold": 0.5, "false_positive_rate": 0.01, "looks_for": "light", **changes}
    names = ("score", "map") if maps else ("score",)
    example = torch.rand(3, 3, size, size)
    metadata = {"detector": {k: v for k, v in found.items() if v is not None}}
    to_onnx(Bright(maps=maps), example, path, uint8=uint8, output_names=names, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return {
        "light": write(folder / "light.onnx", maps=True),
        "float": write(folder / "float.onnx", maps=True, uint8=False),
        "glare": write(folder / "glare.onnx", threshold=0.9, false_positive_rate=0.002),
        "large": write(folder / "large.onnx", size=16),
        "mute": write(folder / "mute.onnx", threshold=None),
    }


def grey(*values: int) -> np.ndarray:
    shades = np.array(values, np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (len(values), SIZE, SIZE, 3)).copy()


@pytest.mark.integration
@pytest.mark.parametrize("name", ["light", "float"])
def test_an_extractor_gives_map_score_and_decision(files, name):
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    images[2] //= 4
    found = Extractor(files[name])(images)
    want = to_float(images)
    assert np.allclose(found.score, want.mean(dim=(1, 2, 3)), atol=1e-6)
    assert np.allclose(found.maps, want.mean(dim=1, keepdim=True), atol=1e-6)
    assert found.marked.tolist() == [bool(s >= 0.5) for s in found.score]
    assert found.marked.dtype == bool and not found.marked[2]


def test_a_score_at_the_threshold_counts(tmp_path):
    detector = write(tmp_path / "d.onnx", maps=True, threshold=1.0)
    assert Extractor(detector)(grey(255, 254)).marked.tolist() == [True, False]


def test_a_scanner_flags_what_any_of_its_detectors_flags(files):
    scanner = Scanner(files["light"], files["glare"])
    scan = scanner(grey(0, 200, 255))
    assert scan.flagged.tolist() == [False, True, True]
    assert {name: flags.tolist() for name, flags in scan.flags.items()} == {
        "light": [False, True, True],
        "glare": [False, False, True],
    }
    assert np.allclose(scan.scores["light"], np.array([0, 200, 255]) / 255, atol=1e-6)
    assert scanner.false_positive_rate == pytest.approx(0.012)
    assert repr(scanner) == "Scanner(light, glare)"
    assert "looks for light at a false-positive rate of 0.01" in repr(scanner.detectors["light"])


def test_a_folder_is_judged_in_order_and_what_is_no_image_is_named(files, tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(7):
        image = grey(255 if number % 3 == 0 else 20)[0]
        save_image(tmp_path / ("deep" if number > 4 else ".") / f"{number}.png", image)
    (tmp_path / "3b.png").write_bytes(b"no picture")
    rows = list(Scanner(files["light"]).folder(tmp_path, batch_size=3))
    assert [row.file for row in rows if row.flagged] == ["0.png", "3.png", "deep/6.png"]
    assert len(rows) == 8 and [row.file for row in rows] == sorted(row.file for row in rows)
    (broken,) = [row for row in rows if row.error]
    assert broken.file == "3b.png" and not broken.flagged and broken.scores == {}
    assert "\n" not in broken.error
    assert rows[0].scores["light"] == pytest.approx(1.0)


def test_a_folder_of_nothing_but_damaged_files(files, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    rows = list(Scanner(files["light"]).folder(tmp_path, batch_size=2))
    assert len(rows) == 5 and all(row.error and not row.flagged for row in rows)


@pytest.mark.integration
def test_what_is_no_detector_is_refused(files, tmp_path):
    class Picture(nn.Module):
        def forward(self, images):
            return 1 - images

    to_onnx(Picture(), torch.rand(3, 3, SIZE, SIZE), tmp_path / "p.onnx", uint8=True)
    with pytest.raises(ValueError, match="expected a detector of images with an output score"):
        Detector(tmp_path / "p.onnx")
    with pytest.raises(ValueError, match=r"expected mute\.onnx to hold a detector's threshold"):
        Detector(files["mute"])
    with pytest.raises(
        ValueError, match=r"expected a detector with an output map, got glare\.onnx"
    ):
        Extractor(files["glare"])
    for paths, told in (
        ([], "different names, got none"),
        ([files["light"], files["light"]], "different names, got light, light"),
        ([files["light"], files["large"]], "expected detectors of one image size"),
    ):
        with pytest.raises(ValueError, match=told):
            Scanner(*paths)


def test_bad_images_are_refused(files, subtests):
    for bad in [
        grey(1)[0],
        grey(1).astype(np.float32),
        grey(1)[:, :4],
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
        [[1]],
    ]:
        with subtests.test(bad=bad):
            for judge in (Scanner(files["light"]), Extractor(files["float"])):
                with pytest.raises(ValueError, match="expected"):
                    judge(bad)


def test_bad_folders_are_refused(files, tmp_path):
    scanner = Scanner(files["light"])
    with pytest.raises(ValueError, match="batch size >= 1"):
        list(scanner.folder(tmp_path, batch_size=0))
    with pytest.raises(ValueError):
        list(scanner.folder(tmp_path / "none"))


def test_it_works_where_torch_cannot_be_imported(files):
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from wm_inject.runtime import Extractor, Scanner
pixels = np.full((2, {SIZE}, {SIZE}, 3), 255, np.uint8)
print(Scanner({str(files["glare"])!r})(pixels).flagged)
print(Extractor({str(files["light"])!r})(pixels).marked)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["[", "True", "True]", "[", "True", "True]"]


def test_the_command_lists_what_is_flagged(files, tmp_path, capsys):
    folder = tmp_path / "in"
    for number in range(5):
        save_image(folder / f"{number}.png", grey(255 if number == 2 else 20)[0])
    (folder / "4b.png").write_bytes(b"no picture")
    found = tmp_path / "found.json"
    given = ["--detector", str(files["light"]), "--detector", str(files["glare"])]
    assert main(["scan", *given, "--json", str(found), str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flagged  2.png  light 1  glare 1"
    assert lines[1].startswith("unread   4b.png: ")
    assert lines[2] == "1 of 5 images flagged (false-positive rate at most 0.012), 1 unread"
    told = json.loads(found.read_text())
    assert told["detectors"]["glare"]["threshold"] == 0.9
    assert [row["file"] for row in told["images"] if row["flagged"]] == ["2.png"]
    assert [row["error"] for row in told["images"] if row["error"]] == ["no picture"]
    assert main(["scan", "--detector", str(tmp_path / "none.onnx"), str(folder)]) == 1
    assert "found no file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["scan", str(folder)])
    assert stopped.value.code == 64


def test_the_command_names_what_it_does_not_look_at_and_fails_where_it_reads_nothing(
    files, tmp_path, capsys
):
    folder = tmp_path / "in"
    save_image(folder / "a.png", grey(255)[0])
    # A mark does not hide behind a suffix, nor behind a line that looks like the command's own.
    for name in ("b.PNG.bak", "c", "d\nflagged  e.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    report, command = tmp_path / "found.json", ["scan", "--detector", str(files["light"])]
    assert main([*command, "--json", str(report), str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["a.png", "b.PNG.bak", "c", r"d\nflagged  e.png"]
    assert [line for line in lines if line.startswith("flagged")] == [
        f"flagged  {name}  light 1" for name in names
    ]
    assert lines[-1].startswith("not looked at: ")
    results = json.loads(report.read_text())
    assert [row["file"] for row in results["images"]] == names
    left_out = {row["file"]: row["reason"] for row in results["left_out"]}
    assert set(left_out) == {"notes.txt", ".hidden.png", "Thumbs.db"}
    assert all(f"{name}" in lines[-1] and why in lines[-1] for name, why in left_out.items())
    for name in ("a.png", "b.PNG.bak", "c", "d\nflagged  e.png"):
        (folder / name).unlink()
    (folder / "a.png").write_bytes(b"no picture")
    assert main([*command, "--json", str(report), str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("unread   a.png: ") and "1 of 1 images" in output.err
    assert json.loads(report.read_text())["images"][0]["error"]


def test_devices():
    assert providers_for("auto") == providers_for("cpu") == ("CPUExecutionProvider",)
    assert providers_for("cuda")[0] == "CUDAExecutionProvider"
    with pytest.raises(ValueError, match="expected a device in auto, cpu, cuda"):
        providers_for("tpu")
