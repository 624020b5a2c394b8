from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wm_inject import BadNetsTrigger, BlendTrigger, MarksmanTrigger, save_trigger
from wm_inject.__about__ import __version__
from wm_inject.cli import main
from wm_inject.core.images import load_image, save_image
from wm_inject.watermark.pretrained import PRETRAINED

SIZE = 16


@pytest.fixture
def photos(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    for name, image in zip("abc", pixels, strict=True):
        save_image(tmp_path / "photos" / f"{name}.png", image)
    return tmp_path / "photos"


def read(folder) -> np.ndarray:
    return np.stack([load_image(folder / f"{name}.png") for name in "abc"])


def paths(*values) -> list[str]:
    return [str(value) for value in values]


def test_sizes_are_said_by_poison_and_by_stealth(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wm_inject.stealth.perceptual.find_lpips_weights", lambda: None)
    draw, source, out = np.random.default_rng(0), tmp_path / "photos", tmp_path / "poisoned"
    for name, side in (("a.png", 60), ("b.png", 40), ("c.png", 16)):
        save_image(source / name, draw.integers(0, 256, (side, side, 3), np.uint8))
    poison = ("poison", "--trigger", "badnets", "--image-size", "16", source, out)
    assert main(paths(*poison)) == 0
    sizes = "2 of 3 images were resized: 60 x 60 to 16 x 16 (1), 40 x 40 to 16 x 16 (1) pixels"
    assert sizes in capsys.readouterr().out
    assert main(paths(*poison)) == 0
    assert "resized" not in capsys.readouterr().out  # nothing was left to write
    assert main(paths("stealth", "--json", tmp_path / "stealth.json", source, out)) == 0
    output = capsys.readouterr().out
    figures = json.loads((tmp_path / "stealth.json").read_text())
    assert f"{sizes}; at the changed size:" in output and output.count("psnr") == 2
    assert figures["sizes"] == [[[n, n], [16, 16]] for n in (60, 40, 16)]
    large, small = figures["psnr"], figures["at_changed_size"]["psnr"]
    assert large[2] == small[2] and all(a < b - 10 for a, b in zip(large[:2], small, strict=False))


@pytest.mark.integration
def test_save_export_poison_and_measure(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wm_inject.stealth.perceptual.find_lpips_weights", lambda: None)
    saved, model = tmp_path / "t.safetensors", tmp_path / "t.onnx"
    trigger = BlendTrigger(image_size=SIZE, channels=3, alpha=0.1)
    save_trigger(trigger, saved)
    told = tmp_path / "told.json"
    given = ["--json", str(told), "--checkpoint", *paths(saved, photos, tmp_path / "one")]
    assert main(["poison", *given]) == 0
    counts = {"images": 3, "poisoned": 3, "written": 3, "resized": 0}
    assert counts.items() <= json.loads(told.read_text()).items()
    assert main(["export", "--uint8", "--json", *paths(told, saved, model)]) == 0
    shown, found = capsys.readouterr().out, json.loads(told.read_text())
    assert f"{model}: at batch sizes 1 and 3 within {found['max_abs']:.2g} of" in shown
    assert (found["file"], found["batches"], found["precision"]) == (str(model), [1, 3], "float32")
    assert main(["poison", "--onnx", *paths(model, photos, tmp_path / "two")]) == 0
    assert np.array_equal(read(tmp_path / "one"), read(tmp_path / "two"))
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["trigger"]["config"] == trigger.config
    capsys.readouterr()
    report = tmp_path / "s.json"
    assert main(["stealth", "--json", *paths(report, photos, tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 pairs") and "lpips not measured: LPIPS needs" in shown
    values = json.loads(report.read_text())
    assert len(values["psnr"]) == 3 and values["lpips"] is None
    assert values["files"] == ["a.png", "b.png", "c.png"]
    assert max(values["linf"]) <= 0.1 + 1 / 255


@pytest.mark.integration
def test_what_ships_is_exported_by_its_name(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 256, (32, 32, 1), dtype=np.uint8)
        save_image(tmp_path / "photos" / f"{name}.png", pixels)
    name, model = "tiny-32-grey", tmp_path / "t.onnx"
    assert main(["export", "--uint8", "--pretrained", name, str(model)]) == 0
    assert "at batch sizes 1 and 3 within" in capsys.readouterr().out
    photos = tmp_path / "photos"
    assert main(["poison", "--onnx", *paths(model, photos, tmp_path / "one")]) == 0
    assert main(["poison", "--pretrained", name, *paths(photos, tmp_path / "two")]) == 0
    change = read(tmp_path / "one").astype(int) - read(tmp_path / "two")
    assert abs(change).max() <= 1 and (change == 0).mean() > 0.999
    # OUT may come first or last.
    assert main(["export", str(tmp_path / "u.pt"), "--pretrained", name]) == 0


@pytest.mark.parametrize(
    "given",
    [
        ["t.onnx"],
        [],
        ["--pretrained", "tiny-32"],
        ["--pretrained", "tiny-32", "t.safetensors", "o"],
    ],
)
def test_an_export_is_of_a_file_or_of_a_name(given, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", *given])
    assert caught.value.code == 64
    said = capsys.readouterr().err
    assert "give either CHECKPOINT or --pretrained NAME, and OUT" in said and said.count("\n") == 1


def test_an_unknown_name_lists_the_names(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", "--pretrained", "huge", "t.onnx"])
    assert caught.value.code == 64
    said = capsys.readouterr().err
    assert all(name in said for name in PRETRAINED) and said.count("\n") == 1


def test_export_to_torchscript(tmp_path):
    saved, out = tmp_path / "t.safetensors", tmp_path / "t.pt"
    save_trigger(BadNetsTrigger(image_size=SIZE), saved)
    assert main(["export", "--channels", "1", *paths(saved, out)]) == 0
    images = torch.rand(2, 1, SIZE, SIZE)
    assert torch.equal(torch.jit.load(str(out))(images), BadNetsTrigger(image_size=SIZE)(images))


@pytest.mark.integration
def test_a_trigger_that_wants_a_target_is_exported_and_poisons_the_same(photos, tmp_path, capsys):
    saved, model = tmp_path / "t.safetensors", tmp_path / "t.onnx"
    save_trigger(MarksmanTrigger(image_size=SIZE, channels=3, num_classes=4, width=4), saved)
    assert main(["export", *paths(saved, model)]) == 0
    for name, way in (("one", ["--checkpoint", saved]), ("two", ["--onnx", model])):
        assert main(["poison", "--target", "3", *paths(*way, photos, tmp_path / name)]) == 0
    one, two = read(tmp_path / "one").astype(int), read(tmp_path / "two").astype(int)
    assert np.abs(one - two).max() <= 1 and (one != two).mean() <= 1e-3
    assert not np.array_equal(one, read(photos))
    capsys.readouterr()
    assert main(["poison", "--onnx", *paths(model, photos, tmp_path / "no"), "--target", "4"]) == 1
    assert "expected target in 0 .. 3, got 4 .. 4" in capsys.readouterr().err


def test_usage_errors_exit_64(capsys, subtests):
    for arguments in [
        [],
        ["train"],
        ["export", "t.safetensors", "t.zip"],
        ["export", "--uint8", "t.safetensors", "t.pt"],
        ["export", "--external-data", "t.safetensors", "t.pt"],
        ["export", "--triton", "repository", "t.safetensors", "t.pt"],
        ["export", "--precision", "int4", "t.safetensors", "t.onnx"],
        ["stealth", "one"],
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert caught.value.code == 64
            assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "none.safetensors", "t.onnx"],
        ["stealth", "none", "none"],
    ],
)
def test_other_errors_are_one_line_and_exit_1(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["poison"], ["fit"], ["export"], ["stealth"]])
def test_help_and_version(command, capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as caught:
            main([*command, option])
        assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "example" in shown and shown.endswith(f"wm-inject {__version__}\n")
    if not command:
        assert 'There is no "wm-inject train"' in shown


@pytest.mark.integration
def test_export_into_a_triton_repository(tmp_path, capsys):
    saved, repository = tmp_path / "t.safetensors", tmp_path / "repository"
    save_trigger(BadNetsTrigger(image_size=16), saved)
    given = paths(saved, tmp_path / "mark.onnx")
    assert main(["export", "--uint8", "--triton", str(repository), *given]) == 0
    assert (repository / "mark/1/model.onnx").is_file()
    assert 'name: "mark"' in (repository / "mark/config.pbtxt").read_text()
    assert str(repository / "mark") in capsys.readouterr().out
