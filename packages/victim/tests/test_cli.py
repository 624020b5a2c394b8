import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wm_inject import BadNetsTrigger, OnnxModel, WaNetTrigger, save_image, save_trigger
from wm_inject.core.checkpoint import load_checkpoint
from wm_victim import __version__, build_classifier, load_dataset, save_classifier
from wm_victim.cli import main

SMALL = ["--data", "digits", "--image-size", "16", "--device", "cpu"]
TRAIN = ["train", *SMALL, "--width", "8", "--epochs", "2", "--limit", "400"]


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "patch.safetensors"
    save_trigger(BadNetsTrigger(image_size=16, size=4), path)
    return path


@pytest.mark.integration
def test_train_and_test_agree(
    tmp_path: Path, patch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "victim.safetensors"
    attack = ["--trigger", str(patch), "--target", "2"]
    told = ["--json", str(tmp_path / "told.json")]
    assert main([*TRAIN, "--out", str(out), *attack, "--ratio", "0.2", *told]) == 0
    first = capsys.readouterr().out.splitlines()
    test = ["test", str(out), "--data", "digits", "--device", "cpu", *attack]
    assert main([*test, "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out.splitlines() == first[1:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads((tmp_path / "told.json").read_text())
    assert (found["images"], found["target"]) == (597, 2)
    assert f"{found['accuracy']:.4f}" in first[1] and f"{found['attack_success']:.4f}" in first[2]
    assert first[1].startswith("accuracy") and first[2].startswith("attack success")
    assert [path.name for path in out.parent.iterdir()] == ["victim.safetensors"]
    saved = load_checkpoint(out, kind="classifier")
    assert saved.metadata["attack"]["plan"]["target"] == 2
    assert saved.metadata["data"]["name"] == "digits"
    assert len(saved.metadata["history"]["losses"]) == 2


@pytest.mark.integration
def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for out in outs:
        torch.rand(1)
        assert main([*TRAIN, "--out", str(out), "--epochs", "1"]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.integration
def test_noise_mode_is_for_triggers_that_offer_it(
    tmp_path: Path, patch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warp = tmp_path / "warp.safetensors"
    save_trigger(WaNetTrigger(image_size=16), warp)
    command = [*TRAIN, "--out", str(tmp_path / "v.safetensors"), "--noise-mode", "--epochs", "1"]
    assert main([*command, "--trigger", str(warp)]) == 0
    capsys.readouterr()
    assert main([*command, "--trigger", str(patch)]) == 1
    assert "badnets trigger has no noise mode" in capsys.readouterr().err


def test_what_is_in_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "digits", "--json", str(tmp_path / "d.json")]) == 0
    told = json.loads((tmp_path / "d.json").read_text())
    digits = load_dataset("digits")
    sizes = [int((digits.train.labels == label).sum()) for label in range(10)]
    assert told == {
        "name": "digits",
        "image_size": 32,
        "channels": 1,
        "classes": 10,
        "train": 1200,
        "test": 597,
        "smallest_class": min(sizes),
        "largest_class": max(sizes),
        "mib_in_memory": round(1797 * 32 * 32 * 4 / 2**20, 1),
        "mib_on_a_gpu": round(1200 * 32 * 32 / 2**20, 1),
        "fingerprint": digits.fingerprint,
    }
    assert main(["data", "digits", "--image-size", "16"]) == 0
    assert "image size             16\n" in capsys.readouterr().out


def test_a_folder_is_read_as_the_options_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "set", tmp_path / "told.json"
    for index in range(8):
        save_image(folder / f"{index}.png", np.full((8, 8, 3), index, np.uint8))
    (folder / "8.png").write_bytes(b"no picture")
    table = tmp_path / "truth.csv"
    table.write_text("image;kind\n" + "".join(f"{n}.png;{'ab'[n % 2]}\n" for n in range(9)))
    assert main(["data", str(folder)]) == 1
    assert "--labels" in capsys.readouterr().err
    command = ["data", str(folder), "--labels", str(table)]
    assert main(command) == 1
    assert "8.png" in (error := capsys.readouterr().err) and "--skip-unreadable" in error
    assert main([*command, "--skip-unreadable", "--json", str(report)]) == 0
    output = capsys.readouterr()
    assert "truth.csv (image and kind), 8 images of 2 classes (a 4, b 4)" in output.err
    source = json.loads(report.read_text())["source"]
    assert source["classes"] == [{"name": name, "images": 4} for name in "ab"]
    assert source["left_out"] == [{"file": "8.png", "reason": "no picture"}]


@pytest.mark.integration
def test_a_kept_checkpoint_stays(tmp_path: Path) -> None:
    kept = tmp_path / "run.safetensors"
    command = [*TRAIN, "--out", str(tmp_path / "v.safetensors"), "--checkpoint", str(kept)]
    assert main([*command, "--epochs", "1"]) == 0
    assert kept.is_file()


@pytest.mark.integration
def test_digits_are_never_mirrored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TRAIN, "--out", str(tmp_path / "v.safetensors"), "--epochs", "1"]
    assert main([*command, "--augment", "crop-flip"]) == 1
    assert "use --augment crop" in capsys.readouterr().err
    for preset, mode in (("paper", "crop"), ("airbench", "shift")):
        assert main([*command, "--preset", preset]) == 0
        saved = load_checkpoint(tmp_path / "v.safetensors")
        assert saved.metadata["recipe"]["augment"] == mode


def test_wrong_usage_exits_64(
    capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for arguments in [
        [],
        ["train", "--data", "digits"],
        [*TRAIN, "--out", "x", "--schedule", "step"],
        [*TRAIN, "--out", "x", "--noise-mode"],
        [*TRAIN, "--out", "x", "--attack", "nothing"],
        [*TRAIN, "--out", "x", "--attack", "watermark"],
        [*TRAIN, "--out", "x", "--attack", "badnets", "--trigger", "t"],
        [*TRAIN, "--out", "x", "--attack", "wanet", "--noise-mode"],
        [*TRAIN, "--out", "x", "--attack", "sig", "--clean-label"],
        [*TRAIN, "--out", "x", "--attack", "badnets", "--set", "margin"],
        [*TRAIN, "--out", "x", "--attack", "ssba", "--profile", "huge"],
        [*TRAIN, "--out", "x", "--profile", "tiny"],
        [*TRAIN, "--out", "x", "--trigger", "t", "--set", "a=1"],
        [*TRAIN, "--out", "x", "--trigger", "t", "--save-trigger", "u"],
        [*TRAIN, "--out", "x", "--model", "resnet99"],
        [*TRAIN, "--out", "x", "--attack", "badnets", "--ratio", "1.5"],
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 64
            assert len(capsys.readouterr().err.splitlines()) == 1


def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for arguments, message in [
        (["--data", "nothing"], "expected a data set"),
        (["--trigger", "missing.safetensors"], "missing.safetensors"),
        (["--attack", "badnets", "--set", "nothing=1"], "'nothing'"),
        (["--attack", "marksman", "--set", "nothing=1"], "settings of marksman"),
        (["--attack", "badnets", "--target", "10"], "target"),
        (["--attack", "sig", "--target", "10"], "target"),
    ]:
        with subtests.test(arguments=arguments, message=message):
            assert main([*TRAIN, "--out", str(tmp_path / "v.safetensors"), *arguments]) == 1
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_value_out_of_range_is_told_before_any_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", "nothing", "--out", str(tmp_path / "v"), "--lr", "-1"])
    assert caught.value.code == 64
    assert "argument --lr: expected" in capsys.readouterr().err


@pytest.mark.integration
def test_testing_on_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.safetensors"
    assert main([*TRAIN, "--out", str(out), "--epochs", "1"]) == 0
    from PIL import Image

    for label in ("a", "b"):
        for index in range(3):
            (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16)).save(tmp_path / "folder" / label / f"{index}.png")
    capsys.readouterr()
    assert main(["test", str(out), "--data", str(tmp_path / "folder")]) == 1
    assert "with 10 classes, folder has 2" in capsys.readouterr().err


def test_help_and_version_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["test", "--version"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    assert f"wm-victim {__version__}" in capsys.readouterr().out


@pytest.mark.integration
def test_a_classifier_is_exported_in_either_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, images = tmp_path / "v.safetensors", torch.rand(4, 1, 16, 16)
    model = build_classifier("resnet10", num_classes=10, channels=1, image_size=16, width=8).eval()
    classes = [f"class {number}" for number in range(10)]
    save_classifier(model, saved, {"classes": classes})
    told = tmp_path / "told.json"
    assert main(["export", str(saved), str(tmp_path / "v.onnx"), "--json", str(told)]) == 0
    assert json.loads(told.read_text())["file"] == str(tmp_path / "v.onnx")
    assert main(["export", "--precision", "bfloat16", str(saved), str(tmp_path / "v.pt")]) == 0
    assert capsys.readouterr().out.count("of the classifier") == 2
    found = OnnxModel(tmp_path / "v.onnx")
    with torch.no_grad():
        want = model(images)
        script = torch.jit.load(str(tmp_path / "v.pt"))(images)
    assert abs(found(images.numpy()) - want.numpy()).max() < 1e-3
    assert (script - want).abs().max() < 0.1
    assert found.metadata["kind"] == "classifier"
    assert found.metadata["config"]["num_classes"] == 10
    assert found.metadata["classes"] == classes
    assert main(["export", "--precision", "int8", str(saved), str(tmp_path / "w.onnx")]) == 1
    assert "error: expected a model of matrix products" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--uint8", str(saved), str(tmp_path / "w.pt")])
    assert stopped.value.code == 64
