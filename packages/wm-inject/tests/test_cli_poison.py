from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wm_inject import (
    BadNetsTrigger,
    BlendTrigger,
    InputAwareTrigger,
    LfTrigger,
    MarksmanTrigger,
    SigTrigger,
    SsbaTrigger,
    WaNetTrigger,
    build_trigger,
    save_trigger,
)
from wm_inject.attacks import ATTACKS
from wm_inject.cli import main
from wm_inject.core.images import load_image, save_image, to_float, to_pixels

SIZE = 32
SHAPE = {"image_size": SIZE, "channels": 3}
CPU = ["--device", "cpu"]
COUNT = 4
FIXED = [name for name in ATTACKS if ATTACKS[name].fit_command is None]
FITTED = [name for name in ATTACKS if ATTACKS[name].fit_command]


@pytest.fixture
def photos(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    for name, image in zip("abcd", pixels, strict=True):
        save_image(tmp_path / "photos" / f"{name}.png", image)
    return tmp_path / "photos"


@pytest.fixture
def classes(photos, tmp_path):
    """The same images in the class folders 0 and 1."""
    for place, name in enumerate("abcd"):
        image = load_image(photos / f"{name}.png")
        save_image(tmp_path / "classes" / str(place // 2) / f"{name}.png", image)
    return tmp_path / "classes"


def paths(*values) -> list[str]:
    return [str(value) for value in values]


def read(folder) -> np.ndarray:
    return np.stack([load_image(folder / f"{name}.png") for name in "abcd"])


def apply(trigger: torch.nn.Module, folder, *, target: int = 0) -> np.ndarray:
    ids, labels = torch.arange(COUNT), torch.full((COUNT,), target)
    with torch.no_grad():
        return to_pixels(trigger.eval()(to_float(read(folder)), ids=ids, target=labels))


def plan_of(folder) -> dict:
    return json.loads((folder / "plan.json").read_text())


def fitted(kind: str) -> torch.nn.Module:
    """A trigger of a kind that must be fitted, fresh: what poisoning makes of it is the same."""
    if kind == "watermark":
        from wm_inject import WatermarkTrigger
        from wm_inject.watermark.vit import ViTInjector, vit_config

        return WatermarkTrigger(
            ViTInjector(**vit_config("tiny", **SHAPE, depth=1, decoder_depth=1))
        )
    return {
        "ssba": lambda: SsbaTrigger(**SHAPE, bits=8, width=8),
        "lf": lambda: LfTrigger(**SHAPE),
        "marksman": lambda: MarksmanTrigger(**SHAPE, num_classes=4, width=4),
        "input-aware": lambda: InputAwareTrigger(**SHAPE, width=8),
    }[kind]()


@pytest.mark.integration
@pytest.mark.parametrize("kind", FIXED)
def test_a_fixed_trigger_needs_no_more_than_its_name(photos, tmp_path, capsys, kind):
    out = tmp_path / "out"
    assert main(["poison", *CPU, "--trigger", kind, "--seed", "1", *paths(photos, out)]) == 0
    assert capsys.readouterr().out.startswith("4 of 4 images poisoned, listed in ")
    told = plan_of(out)["trigger"]
    assert told["kind"] == kind and told["config"]["image_size"] == SIZE
    assert told["config"].get("seed", 1) == 1
    assert not np.array_equal(read(out), read(photos))
    # Pictures that were given to a trigger are not among its settings; here none was.
    assert np.array_equal(read(out), apply(build_trigger(kind, told["config"]), photos))


@pytest.mark.parametrize("kind", FITTED)
def test_a_fitted_trigger_comes_from_its_file(photos, tmp_path, kind):
    saved, out = tmp_path / "t.safetensors", tmp_path / "out"
    trigger = fitted(kind)
    save_trigger(trigger, saved)
    arguments = ["--trigger", kind, "--checkpoint", *paths(saved, photos, out), "--target", "3"]
    assert main(["poison", *CPU, *arguments]) == 0
    found = read(out).astype(int)
    assert np.abs(found - apply(trigger, photos, target=3)).max() <= 1


@pytest.mark.parametrize("kind", FITTED)
def test_a_fitted_trigger_without_its_file_names_the_next_step(photos, tmp_path, capsys, kind):
    with pytest.raises(SystemExit) as caught:
        main(["poison", "--trigger", kind, *paths(photos, tmp_path / "out")])
    told = capsys.readouterr().err
    assert caught.value.code == 64 and told.count("\n") == 1
    step = {"ssba": "wm-inject fit --trigger ssba", "watermark": "wm-extract train"}
    assert step.get(kind, f"wm-victim train --attack {kind} --save-trigger") in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "trigger"),
    [
        (["--trigger", "badnets", "--patch-size", "4"], BadNetsTrigger(image_size=SIZE, size=4)),
        (
            ["--trigger", "badnets", "--set", "margin=2", "--set", "value=0.5"],
            BadNetsTrigger(image_size=SIZE, margin=2, value=0.5),
        ),
        (
            ["--trigger", "blend", "--alpha", "0.5", "--seed", "3", "--set", "picture=noise"],
            BlendTrigger(**SHAPE, alpha=0.5, seed=3),
        ),
        (["--trigger", "sig", "--set", "frequency=4"], SigTrigger(image_size=SIZE, frequency=4)),
        (
            ["--trigger", "wanet", "--strength", "2", "--seed", "4", "--image-size", str(SIZE)],
            WaNetTrigger(image_size=SIZE, strength=2.0, seed=4),
        ),
    ],
)
def test_settings_reach_the_trigger(photos, tmp_path, options, trigger):
    out = tmp_path / "out"
    assert main(["poison", *CPU, *options, *paths(photos, out)]) == 0
    assert plan_of(out)["trigger"] == {"kind": trigger.kind, "config": trigger.config}
    assert np.array_equal(read(out), apply(trigger, photos))


def test_images_of_another_size_are_resized(photos, tmp_path):
    options = ["--trigger", "badnets", "--image-size", "16", "--channels", "1"]
    assert main(["poison", *CPU, *options, *paths(photos, tmp_path / "out")]) == 0
    wanted = load_image(photos / "a.png", size=16, channels=1)[None]
    wanted = to_pixels(BadNetsTrigger(image_size=16)(to_float(wanted)))
    found = load_image(tmp_path / "out" / "a.png", channels=1)
    assert np.array_equal(found, wanted[0])


def test_images_of_several_sizes_ask_for_one(photos, tmp_path, capsys):
    save_image(photos / "e.png", np.zeros((8, 8, 3), np.uint8))
    assert main(["poison", "--trigger", "wanet", *paths(photos, tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: expected --image-size") and told.count("\n") == 1


def test_a_plan_makes_a_whole_poisoned_set(classes, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--trigger", "badnets", "--ratio", "0.5", "--target", "1", "--pool", "non_target"]
    assert main(["poison", *CPU, *options, *paths(classes, out)]) == 0
    assert capsys.readouterr().out.startswith("1 of 4 images poisoned")
    told = plan_of(out)
    assert told["plan"] == {
        "label_map": "all-to-one",
        "mode": "static",
        "pool": "non_target",
        "ratio": 0.5,
        "seed": 0,
        "target": 1,
    }
    (chosen,) = [row for row in told["images"] if row["poisoned"]]
    assert (chosen["label_before"], chosen["label_after"]) == (0, 1)
    kept = [row for row in told["images"] if not row["poisoned"]]
    for row in kept:
        same = load_image(out / row["file"]), load_image(classes / row["source"])
        assert np.array_equal(*same)


def test_clean_label_draws_from_the_target_class(classes, tmp_path):
    out = tmp_path / "out"
    options = ["--trigger", "sig", "--label-map", "clean-label", "--target", "1"]
    assert main(["poison", *CPU, *options, *paths(classes, out)]) == 0
    told = plan_of(out)
    assert told["plan"]["pool"] == "target" and told["plan"]["ratio"] is None
    assert [row["poisoned"] for row in told["images"]] == [False, False, True, True]
    assert all(row["label_before"] == row["label_after"] for row in told["images"])


def test_the_second_run_goes_on_and_another_is_refused(photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["poison", *CPU, "--trigger", "wanet", *paths(photos, out)]
    assert main(command) == 0
    before = read(out)
    (out / "b.png").unlink()
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("plan.json, 3 files were there")
    assert np.array_equal(read(out), before)
    for change in (["--seed", "2"], ["--ratio", "0.5"], ["--target", "1"], ["--grid", "5"]):
        assert main([*command, *change]) == 1
        understood, told = capsys.readouterr().err.splitlines()
        assert "is of another run" in told and "no labels, 4 images" in understood
    assert np.array_equal(read(out), before)


def test_a_given_picture_counts_as_a_setting(photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["poison", *CPU, "--trigger", "blend", *paths(photos, out)]
    assert main([*command, "--picture", str(photos / "a.png")]) == 0
    assert main([*command, "--picture", str(photos / "b.png")]) == 1
    assert "different: sha256" in capsys.readouterr().err


def test_usage_errors_exit_64(photos, tmp_path, capsys, subtests):
    for arguments in [
        [],
        ["--onnx", "m.onnx", "--trigger", "badnets"],
        ["--onnx", "m.onnx", "--checkpoint", "t"],
        ["--onnx", "m.onnx", "--image-size", "8"],
        ["--trigger", "nothing"],
        ["--trigger", "badnets", "--alpha", "0.1"],
        ["--trigger", "sig", "--patch-size", "3"],
        ["--trigger", "badnets", "--set", "nothing=1"],
        ["--trigger", "badnets", "--set", "margin"],
        ["--trigger", "badnets", "--set", "=1"],
        ["--trigger", "badnets", "--set", "margin=1", "--set", "margin=2"],
        ["--trigger", "badnets", "--patch-size", "2", "--set", "size=2"],
        ["--trigger", "wanet", "--set", "seed=2"],
        ["--trigger", "wanet", "--set", "image_size=8"],
        ["--checkpoint", "t", "--image-size", "8"],
        ["--checkpoint", "t", "--set", "alpha=1"],
        ["--trigger", "badnets", "--label-map", "nothing"],
        ["--trigger", "badnets", "--pool", "nothing"],
        ["--trigger", "badnets", "--ratio", "2"],
        ["--trigger", "badnets", "--target", "-1"],
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(SystemExit) as caught:
                main(["poison", *arguments, *paths(photos, tmp_path / "out")])
            assert caught.value.code == 64
            assert capsys.readouterr().err.count("\n") == 1
            assert not (tmp_path / "out").exists()


def test_other_errors_are_one_line_and_exit_1(
    photos, classes, tmp_path, monkeypatch, capsys, subtests
):
    for arguments, message in [
        (["--trigger", "badnets", "none", "out"], "found none at none"),
        (["--onnx", "none.onnx", "photos", "out"], "found no file"),
        (["--checkpoint", "none.safetensors", "photos", "out"], "found none at none.safetensors"),
        (["--trigger", "badnets", "--ratio", "0.1", "photos", "out"], "asks for 0 of 4"),
        (["--trigger", "badnets", "--set", 'size="x"', "photos", "out"], "badnets trigger"),
        (["--trigger", "badnets", "--pool", "non_target", "photos", "out"], "class folders"),
        (["--trigger", "badnets", "--target", "2", "classes", "out"], "below 2 classes, got 2"),
        (
            ["--trigger", "sig", "--label-map", "clean-label", "--ratio", "1", "classes", "out"],
            "holds 2",
        ),
        (
            ["--trigger", "sig", "--label-map", "clean-label", "--pool", "all", "classes", "out"],
            "go together",
        ),
        (["--trigger", "badnets", "photos", "photos/out"], "output folder outside"),
    ]:
        with subtests.test(arguments=arguments, message=message):
            monkeypatch.chdir(tmp_path)
            assert main(["poison", *CPU, *arguments]) == 1
            *understood, told = capsys.readouterr().err.splitlines()
            assert told.startswith("error: ") and message in told and len(understood) <= 1
            assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_kind_is_refused(photos, tmp_path, capsys):
    saved = tmp_path / "t.safetensors"
    save_trigger(BadNetsTrigger(image_size=SIZE), saved)
    arguments = ["--trigger", "wanet", "--checkpoint", *paths(saved, photos, tmp_path / "o")]
    assert main(["poison", *arguments]) == 1
    assert "expected a wanet trigger, got badnets" in capsys.readouterr().err
