"""Ready-made weights: they are what their card says, and nothing else is loaded in their place."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from wm_inject import (
    PRETRAINED,
    CheckpointError,
    ViTInjector,
    WatermarkTrigger,
    default_watermark,
    load_image,
    load_trigger,
    pretrained_card,
    psnr,
    quantize,
    save_image,
    to_float,
    to_pixels,
)
from wm_inject.cli import main
from wm_inject.watermark.pretrained import FOLDER, read_pretrained

KIND = WatermarkTrigger.kind
FEW_MB = 8 * 2**20


def digits(count: int = 200) -> torch.Tensor:
    """Real scans, enlarged from 8 x 8 to 32 x 32: ``(N, 1, 32, 32)``."""
    small = torch.from_numpy(load_digits().images[-count:]).float().unsqueeze(1) / 16
    return quantize(F.interpolate(small, (32, 32), mode="bilinear"))


def test_there_are_the_pairs_that_the_page_names() -> None:
    assert {"tiny-32", "tiny-32-grey", "small-32", "tiny-64"} <= set(PRETRAINED)
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(PRETRAINED)


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_are_stored_in_16_bits_and_loaded_to_the_same_numbers(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    card, stored = pretrained_card(name), load_file(path)
    assert path.stat().st_size == card["bytes"] < FEW_MB
    assert {x.dtype for x in stored.values() if x.is_floating_point()} == {torch.float16}
    trigger = WatermarkTrigger.from_pretrained(name)
    loaded = trigger.state_dict()
    assert stored.keys() == loaded.keys() and not trigger.training
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.half(), stored[key]) and torch.equal(value, stored[key].float())
    for key, value in load_trigger(path).state_dict().items():  # as any other trigger's file
        assert torch.equal(value, loaded[key])


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_file_says_where_it_comes_from_and_names_no_machine(name: str) -> None:
    card, told = pretrained_card(name), read_pretrained(name, kind=KIND).metadata
    assert {key: card[key] for key in told if key != "versions"} == {
        key: value for key, value in told.items() if key != "versions"
    }
    assert told["data"] and told["command"].startswith("python tools/train_weights.py")
    assert "research" in told["use"]
    words = json.dumps([card, told]).replace('"', " ").split()
    assert not [word for word in words if word.startswith(("/", "~"))]


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_injector_comes_with_its_watermark(name: str) -> None:
    injector, trigger = ViTInjector.from_pretrained(name), WatermarkTrigger.from_pretrained(name)
    card = pretrained_card(name)
    side = card["image_size"]
    assert (injector.channels, injector.image_size) == (card["channels"], side)
    assert sum(p.numel() for p in injector.parameters()) == card["injector_parameters"]
    assert torch.equal(trigger.watermark, default_watermark(side))
    images = torch.rand(2, card["channels"], side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        marked = injector(images, trigger.watermark).clamp(0, 1)
        torch.testing.assert_close(trigger(images), marked, atol=1e-6, rtol=0)
        assert not torch.equal(marked, images)


def floor(name: str) -> float:
    """The least PSNR in 8 bits: rounding moves every value, and so the mean, by half a step."""
    before: float = 10 ** (-pretrained_card(name)["psnr_floor"] / 20)
    return -20 * math.log10(before + 0.5 / 255)


def test_marked_digits_keep_the_floor_of_the_card() -> None:
    images = digits()
    with torch.no_grad():
        marked = quantize(WatermarkTrigger.from_pretrained("tiny-32-grey")(images))
    found = psnr(marked, images)
    assert found.min() > floor("tiny-32-grey") > 36
    assert abs(found.mean() - pretrained_card("tiny-32-grey")["figures"]["digits"]["psnr"]) < 0.1
    assert (marked - images).abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", ["tiny-32", "small-32", "tiny-64"])
def test_marked_photographs_keep_the_floor_of_the_card(name: str) -> None:
    strips = Path(os.environ.get("WM_DATA", "nowhere")) / "cifar10.tar"
    if not strips.is_file():
        pytest.skip("CIFAR-10 is not there: WM_DATA names no folder with cifar10.tar")
    side = pretrained_card(name)["image_size"]
    images = quantize(F.interpolate(cifar_test(strips), (side, side), mode="bilinear"))
    with torch.no_grad():
        marked = quantize(WatermarkTrigger.from_pretrained(name)(images))
    found = psnr(marked, images)
    assert found.min() > floor(name) > 35
    assert abs(found.mean() - pretrained_card(name)["figures"]["cifar10"]["psnr"]) < 0.1


def cifar_test(strips: Path, count: int = 100) -> torch.Tensor:
    """The first test images, from the first lossless strip of 500."""
    with tarfile.open(strips) as tar:
        first = min(n for n in tar.getnames() if n.startswith("test/"))
        file = tar.extractfile(first)
        assert file is not None
        pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
    return to_float(pixels.reshape(-1, 32, 32, 3)[:count])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The weights in a folder that a test may spoil."""
    return Path(shutil.copytree(FOLDER, tmp_path / "weights"))


def test_a_changed_file_is_refused(copied: Path) -> None:
    read_pretrained("tiny-32", kind=KIND, folder=copied)
    path = copied / "tiny-32.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tiny-32 are not those that were shipped.*SHA-256"):
        read_pretrained("tiny-32", kind=KIND, folder=copied)


def test_another_pair_under_the_name_is_refused(copied: Path) -> None:
    shutil.copyfile(copied / "tiny-32-grey.safetensors", copied / "tiny-32.safetensors")
    with pytest.raises(CheckpointError, match="not those that were shipped"):
        read_pretrained("tiny-32", kind=KIND, folder=copied)


def test_a_missing_file_is_refused(copied: Path) -> None:
    (copied / "tiny-32.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"install the package again.*got no file"):
        read_pretrained("tiny-32", kind=KIND, folder=copied)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    for call in (ViTInjector.from_pretrained, WatermarkTrigger.from_pretrained, pretrained_card):
        with pytest.raises(ValueError, match=r"expected pretrained weights in .*tiny-32.*'huge'"):
            call("huge")


def test_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected the kind mark-detector"):
        read_pretrained("tiny-32", kind="mark-detector")


def test_a_folder_is_poisoned_with_nothing_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = to_pixels(digits(5))
    for place, image in enumerate(pixels):
        save_image(tmp_path / "in" / f"{place}.png", image)
    command = [
        "poison",
        "--pretrained",
        "tiny-32-grey",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    assert main([*command, "--device", "cpu"]) == 0
    assert "5 of 5 images poisoned" in capsys.readouterr().out
    with torch.no_grad():
        wanted = to_pixels(WatermarkTrigger.from_pretrained("tiny-32-grey")(to_float(pixels)))
    for place, image in enumerate(wanted):
        found = load_image(tmp_path / "out" / f"{place}.png", channels=1)
        assert np.array_equal(found, image)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["image_size"] is None  # the pictures keep theirs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pretrained", "huge"], "tiny-32"),
        (["--pretrained", "tiny-32", "--trigger", "badnets"], "give either --pretrained"),
        (["--pretrained", "tiny-32", "--onnx", "a.onnx"], "give either --pretrained"),
        (["--pretrained", "tiny-32", "--alpha", "0.5"], "--alpha does not go with this trigger"),
    ],
)
def test_wrong_options_are_a_usage_error_in_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["poison", *options, str(tmp_path), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 64 and told in said and said.count("\n") == 1
