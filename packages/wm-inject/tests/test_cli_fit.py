from __future__ import annotations

import json

import numpy as np
import pytest

from wm_inject import load_trigger
from wm_inject.attacks.ssba import training as ssba_fit
from wm_inject.cli import main
from wm_inject.core.checkpoint import load_checkpoint
from wm_inject.core.images import save_image

SIZE = 16
SSBA = ["--trigger", "ssba", "--profile", "tiny", "--set", "steps=12", "--set", "width=4"]


@pytest.fixture
def photos(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    for place, image in enumerate(pixels):
        save_image(tmp_path / "photos" / f"{place}.png", image)
    return tmp_path / "photos"


def fit(photos, out, *options: str) -> int:
    return main(["fit", "--device", "cpu", *(options or SSBA), str(photos), str(out)])


def test_ssba_is_fitted_and_poisons(photos, tmp_path, capsys):
    out, poisoned = tmp_path / "new" / "ssba.safetensors", tmp_path / "poisoned"
    assert fit(photos, out, *SSBA, "--json", str(tmp_path / "told.json")) == 0
    assert capsys.readouterr().out == f"wrote {out}, fitted to 6 images\n"
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["file"], told["images"], told["profile"]) == (str(out), 6, "tiny")
    assert [path.name for path in out.parent.iterdir()] == ["ssba.safetensors"]
    trigger = load_trigger(out)
    assert (trigger.kind, trigger.config["image_size"]) == ("ssba", SIZE)
    saved = load_checkpoint(out).metadata
    assert saved["profile"] == "tiny" and saved["settings"] == {"steps": 12, "width": 4}
    assert main(["poison", "--checkpoint", str(out), str(photos), str(poisoned)]) == 0
    assert len(list(poisoned.glob("*.png"))) == 6


@pytest.mark.integration
def test_a_stopped_fit_goes_on_to_the_same_bytes(photos, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    monkeypatch.setattr(ssba_fit, "CHECKPOINT_EVERY", 5)
    assert fit(photos, whole) == 0
    save = ssba_fit.save_state

    def save_and_stop(*arguments, **settings):
        save(*arguments, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(ssba_fit, "save_state", save_and_stop)
        assert fit(photos, out) == 130
    assert not out.exists() and (tmp_path / "part.fitting.safetensors").is_file()
    capsys.readouterr()
    assert fit(photos, out, *SSBA, "--seed", "1") == 1
    assert "checkpoint of another run" in capsys.readouterr().err
    steps = []
    advance = ssba_fit._Run.advance
    monkeypatch.setattr(
        ssba_fit._Run, "advance", lambda self, *a: steps.append(self.step) or advance(self, *a)
    )
    assert fit(photos, out) == 0
    assert steps == list(range(5, 12))
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "part.fitting.safetensors").exists()


def test_blindnets_strength_is_chosen_for_the_images(photos, tmp_path):
    out = tmp_path / "blindnet.safetensors"
    assert fit(photos, out, "--trigger", "blindnet") == 0
    strength = load_trigger(out).config["strength"]
    assert load_checkpoint(out).metadata["facts"]["strength"] == strength > 0


def test_usage_errors_exit_64(photos, tmp_path, capsys, subtests):
    for options, message in [
        ([], "the following arguments are required: --trigger"),
        (["--trigger", "wanet"], "wanet"),
        (["--trigger", "lf"], "wm-victim train --attack lf"),
        (["--trigger", "watermark"], "wm-extract train"),
        ([*SSBA, "--set", "steps=3"], "each name once"),
        ([*SSBA, "--set", "seed=3"], "seed is not given with --set"),
        ([*SSBA, "--profile", "huge"], "invalid choice"),
        ([*SSBA, "--image-size", "0"], "argument --image-size"),
    ]:
        with subtests.test(options=options, message=message):
            with pytest.raises(SystemExit) as caught:
                main(["fit", *options, str(photos), str(tmp_path / "t.safetensors")])
            told = capsys.readouterr().err
            assert caught.value.code == 64 and told.count("\n") == 1 and message in told


def test_the_file_is_a_safetensors_file(photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        fit(photos, tmp_path / "t.onnx")
    assert caught.value.code == 64
    assert "OUT ends in .safetensors, got t.onnx" in capsys.readouterr().err


def test_other_errors_are_one_line_and_exit_1(photos, tmp_path, capsys, subtests):
    for options, message in [
        ([*SSBA, "--set", "nothing=1"], "nothing"),
        ([*SSBA, "--set", "lr=-1"], "lr"),
        (["--trigger", "blindnet", "--set", "nothing=1"], "expected settings of blindnet"),
    ]:
        with subtests.test(options=options, message=message):
            assert fit(photos, tmp_path / "t.safetensors", *options) == 1
            told = capsys.readouterr().err
            assert told.startswith("error: ") and told.count("\n") == 1 and message in told


def test_unreadable_images_are_named_or_skipped(photos, tmp_path, capsys):
    for name in ("7.png", "8.png"):
        (photos / name).write_bytes(b"no picture")
    out = tmp_path / "f.safetensors"
    assert fit(photos, out) == 1
    assert "cannot read 2 of 8 images: 2 no picture (7.png, 8.png)" in capsys.readouterr().err
    assert fit(photos, out, *SSBA, "--skip-unreadable") == 0
    assert "fitted to 6 images" in capsys.readouterr().out


def test_images_of_several_sizes_ask_for_one(photos, tmp_path, capsys):
    save_image(photos / "z.png", np.zeros((8, 8, 3), np.uint8))
    assert fit(photos, tmp_path / "t.safetensors") == 1
    assert "expected --image-size" in capsys.readouterr().err
    assert fit(photos, tmp_path / "t.safetensors", *SSBA, "--image-size", str(SIZE)) == 0
