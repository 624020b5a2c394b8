"""The ready-made extractors: each finds the mark of the injector of its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from wm_extract import (
    PAPER_CORRUPTIONS,
    MarkDetector,
    UNetExtractor,
    balanced_bit_accuracy,
    extract,
    load_detector,
)
from wm_extract.cli import main
from wm_extract.detect import KIND, WEIGHTS
from wm_inject import (
    PRETRAINED,
    CheckpointError,
    WatermarkTrigger,
    pretrained_card,
    quantize,
    save_image,
    to_pixels,
)
from wm_inject.cli import main as inject
from wm_inject.runtime import Extractor
from wm_inject.watermark.pretrained import read_pretrained

GREY = "tiny-32-grey"


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """Real scans that no ready-made weights were trained on: ``(N, 1, 32, 32)``."""
    small = torch.from_numpy(load_digits().images).float().unsqueeze(1)[-400:] / 16
    return quantize(torch.nn.functional.interpolate(small, (32, 32), mode="bilinear"))


@pytest.fixture(scope="module")
def marked(digits: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return quantize(WatermarkTrigger.from_pretrained(GREY)(digits))


def test_every_injector_has_its_extractor() -> None:
    assert {path.stem for path in WEIGHTS.glob("*.safetensors")} == set(PRETRAINED)


def test_both_halves_agree_on_the_watermark_and_on_where_they_come_from(
    subtests: pytest.Subtests,
) -> None:
    for name in PRETRAINED:
        with subtests.test(name=name):
            detector, trigger = (
                MarkDetector.from_pretrained(name),
                WatermarkTrigger.from_pretrained(name),
            )
            assert torch.equal(detector.watermark, trigger.watermark)
            assert detector.extractor.config["channels"] == trigger.injector.channels
            assert detector.false_positive_rate == pretrained_card(name)["false_positive_rate"]
            other = json.loads((WEIGHTS / "cards.json").read_text("utf-8"))[name]
            own = ("sha256", "bytes")
            assert {k: v for k, v in other.items() if k not in own} == {
                k: v for k, v in pretrained_card(name).items() if k not in own
            }


def test_weights_are_stored_in_16_bits_and_loaded_to_the_same_numbers(
    subtests: pytest.Subtests,
) -> None:
    for name in PRETRAINED:
        with subtests.test(name=name):
            stored = load_file(WEIGHTS / f"{name}.safetensors")
            assert {x.dtype for x in stored.values() if x.is_floating_point()} == {torch.float16}
            extractor = UNetExtractor.from_pretrained(name)
            assert not extractor.training
            state = extractor.state_dict()
            assert {key.removeprefix("extractor.") for key in stored} == {*state, "watermark"}
            for key, value in state.items():
                assert torch.equal(value, stored[f"extractor.{key}"].to(value.dtype))
            assert load_detector(WEIGHTS / f"{name}.safetensors").watermark.dtype == torch.float32


@pytest.mark.integration
def test_marks_are_found_and_unmarked_images_are_not(
    digits: torch.Tensor, marked: torch.Tensor
) -> None:
    detector = MarkDetector.from_pretrained(GREY)
    card = pretrained_card(GREY)["figures"]["digits"]
    found = detector.detect(marked)
    assert found.marked.float().mean() >= card["found"]["none"] - 0.02
    assert detector.detect(digits).marked.float().mean() <= card["false_alarms"]["none"] + 0.02
    assert balanced_bit_accuracy(found.maps, detector.watermark).mean() > 0.95


@pytest.mark.integration
@pytest.mark.parametrize("corruption", PAPER_CORRUPTIONS)
def test_marks_survive_as_the_card_says(
    corruption: str, digits: torch.Tensor, marked: torch.Tensor
) -> None:
    detector, card = MarkDetector.from_pretrained(GREY), pretrained_card(GREY)["figures"]["digits"]
    change, stream = PAPER_CORRUPTIONS[corruption], torch.Generator().manual_seed(0)
    # Other draws than the card's and 400 images: three standard errors of a share are 0.075.
    share = detector.detect(change(marked, generator=stream)).marked.float().mean()
    assert abs(float(share) - card["found"][corruption]) < 0.075


def test_a_pair_does_not_answer_for_noise(digits: torch.Tensor) -> None:
    detector = MarkDetector.from_pretrained(GREY)
    noise = torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert detector.detect(noise).marked.float().mean() < 0.05


def test_an_unknown_name_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    for call in (MarkDetector.from_pretrained, UNetExtractor.from_pretrained):
        with pytest.raises(ValueError, match=r"expected pretrained weights in .*tiny-32.*'huge'"):
            call("huge")
    folder = Path(shutil.copytree(WEIGHTS, tmp_path / "weights"))
    path = folder / "tiny-32.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="not those that were shipped"):
        read_pretrained("tiny-32", kind=KIND, folder=folder)


@pytest.mark.integration
def test_from_the_command_line_both_halves_work_together(
    tmp_path: Path, digits: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, image in enumerate(to_pixels(digits[:20])):
        save_image(tmp_path / "in" / f"{place:02}.png", image)
    where = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert inject(["poison", "--pretrained", GREY, *where, "--device", "cpu"]) == 0
    for folder, low, high in ((where[1], 18, 20), (where[0], 0, 2)):
        report = tmp_path / "found.json"
        command = ["detect", folder, "--pretrained", GREY, "--json", str(report)]
        assert main([*command, "--device", "cpu"]) == 0
        rows = json.loads(report.read_text("utf-8"))["images"]
        assert len(rows) == 20 and low <= sum(row["marked"] for row in rows) <= high
    assert "of 20 images are marked (false-positive rate 0.001)" in capsys.readouterr().out


@pytest.mark.integration
def test_both_halves_are_exported_by_their_name(
    tmp_path: Path, digits: torch.Tensor, marked: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = tmp_path / "detector.onnx", tmp_path / "told.json"
    assert main(["export", "--uint8", "--pretrained", GREY, str(out), "--json", str(told)]) == 0
    largest = json.loads(told.read_text())["max_abs"]
    assert f"{out}: at batch sizes 1 and 3 within {largest:.2g} of" in capsys.readouterr().out
    detector = MarkDetector.from_pretrained(GREY)
    images = torch.cat([digits[:20], marked[:20]])
    assert (
        Extractor(out)(to_pixels(images)).marked == detector.detect(images).marked.numpy()
    ).all()


def test_an_export_is_of_a_file_or_of_a_name(
    capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for given, message in [
        (["d.onnx"], "give either DETECTOR or --pretrained NAME, and OUT"),
        (["--pretrained", GREY, "a.safetensors", "d.onnx"], "give either DETECTOR or --pretrained"),
        (["--pretrained", "huge", "d.onnx"], "choose from"),
    ]:
        with subtests.test(given=given, message=message):
            with pytest.raises(SystemExit) as stop:
                main(["export", *given])
            said = capsys.readouterr().err
            assert stop.value.code == 64 and message in said and said.count("\n") == 1


def test_a_detector_must_be_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for options in [
        ["--pretrained", "huge"],
        [],
        ["--pretrained", GREY, "--detector", "detector.safetensors"],
    ]:
        with subtests.test(options=options):
            with pytest.raises(SystemExit) as stop:
                main(["detect", str(tmp_path), *options])
            said = capsys.readouterr().err
            assert stop.value.code == 64 and "--pretrained" in said and said.count("\n") == 1


@pytest.mark.integration
def test_the_extractor_alone_reads_the_mark(digits: torch.Tensor, marked: torch.Tensor) -> None:
    extractor = UNetExtractor.from_pretrained(GREY)
    mark = MarkDetector.from_pretrained(GREY).watermark
    read, nothing = extract(extractor, marked), extract(extractor, digits)
    assert (balanced_bit_accuracy(read, mark) > 0.9).float().mean() > 0.9
    assert (nothing > 0.5).float().mean() < 0.05
