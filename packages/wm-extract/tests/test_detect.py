from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wm_extract import (
    MarkDetector,
    UNetExtractor,
    balanced_bit_accuracy,
    extract,
    load_detector,
    mark_score,
    save_detector,
)
from wm_extract.cli import main
from wm_inject import CheckpointError, default_watermark, load_trigger, save_image

MARK = default_watermark(16)


def extractor() -> UNetExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNetExtractor(channels=1, width=4).eval()


def images(n: int = 60) -> torch.Tensor:
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_balanced_bit_accuracy_by_hand() -> None:
    perfect, inverse = MARK.unsqueeze(0), 1 - MARK.unsqueeze(0)
    constants = torch.cat([torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)])
    assert balanced_bit_accuracy(perfect, MARK).item() == 1
    assert balanced_bit_accuracy(inverse, MARK).item() == 0
    assert balanced_bit_accuracy(constants, MARK).tolist() == [0.5, 0.5]


def test_score_rises_with_the_mark() -> None:
    steps = torch.stack([MARK * s for s in (0.0, 0.2, 0.6, 1.0)])
    score = mark_score(steps, MARK)
    assert (score.diff() > 0).all() and score.isfinite().all()


def test_threshold_holds_the_stated_rate_on_normal_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an independent draw of 100,000 scores: the stated rate, within its error."""
    draw = np.random.default_rng(0)
    calibration, fresh = draw.normal(-3, 1, 4000), draw.normal(-3, 1, 100_000)

    def scores(maps: torch.Tensor, watermark: torch.Tensor) -> torch.Tensor:
        return torch.tensor(calibration)

    monkeypatch.setattr("wm_extract.detect.mark_score", scores)
    detector = MarkDetector.calibrate(extractor(), MARK, images(), false_positive_rate=0.01)
    assert (fresh > detector.threshold).mean() == pytest.approx(0.01, abs=0.004)


def test_calibration_images_stay_unmarked() -> None:
    detector = MarkDetector.calibrate(extractor(), MARK, images())
    assert not detector.detect(images()).marked.any()
    assert detector.calibrated_on == 60


def test_marked_images_move_the_threshold_to_the_middle_of_the_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {0.25: torch.linspace(-6, -5, 60), 0.75: torch.linspace(3, 4, 60)}
    monkeypatch.setattr("wm_extract.detect.extract", lambda _, x, **__: x)
    monkeypatch.setattr("wm_extract.detect.mark_score", lambda x, _: answers[float(x.mean())])
    clean, marked = torch.full((60, 1, 16, 16), 0.25), torch.full((60, 1, 16, 16), 0.75)
    alone = MarkDetector.calibrate(extractor(), MARK, clean).threshold
    both = MarkDetector.calibrate(extractor(), MARK, clean, marked=marked).threshold
    assert -5 <= alone < both and both == pytest.approx(-1, abs=0.5)
    swapped = MarkDetector.calibrate(extractor(), MARK, marked, marked=clean).threshold
    assert swapped > 4, "no gap: the stated rate decides alone"


def test_saves_and_loads_to_the_same_answers(tmp_path: Path) -> None:
    detector = MarkDetector.calibrate(extractor(), MARK, images())
    save_detector(detector, tmp_path / "d.safetensors")
    again = load_detector(tmp_path / "d.safetensors")
    assert again.threshold == detector.threshold
    assert torch.equal(again.detect(images()).score, detector.detect(images()).score)
    (tmp_path / "bad.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        load_detector(tmp_path / "bad.safetensors")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 50"):
        MarkDetector.calibrate(extractor(), MARK, images(10))
    with pytest.raises(ValueError, match="false-positive rate"):
        MarkDetector.calibrate(extractor(), MARK, images(), false_positive_rate=0.7)
    with pytest.raises(ValueError, match="both ones and zeros"):
        mark_score(images(1), torch.ones(1, 16, 16))
    with pytest.raises(ValueError, match="maps of shape"):
        balanced_bit_accuracy(torch.rand(1, 1, 8, 8), MARK)
    with pytest.raises(ValueError, match="eval mode"):
        extract(extractor().train(), images())


def test_a_picture_of_any_size_is_read_at_the_marks() -> None:
    detector = MarkDetector.calibrate(extractor(), MARK, images())
    whole = torch.rand(2, 1, 40, 64, generator=torch.Generator().manual_seed(3))
    small = torch.nn.functional.interpolate(whole, (16, 16), mode="bilinear", antialias=True)
    found, wanted = detector.detect(whole), detector.detect(small.clamp(0, 1))
    assert torch.equal(found.score, wanted.score) and torch.equal(found.maps, wanted.maps)


@pytest.mark.integration
def test_command_line_trains_on_a_folder_and_finds_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for index in range(120):
        save_image(photos / f"{index}.png", draw.integers(0, 256, (20, 20, 1), dtype=np.uint8))
    out = tmp_path / "mark"
    arguments = ["--image-size", "16", "--grey", "--iterations", "3", "--device", "cpu"]
    told = tmp_path / "told.json"
    assert main(["train", str(photos), "--out", str(out), *arguments, "--json", str(told)]) == 0
    measured, output = json.loads(told.read_text()), capsys.readouterr().out
    assert (measured["iterations"], measured["images"]) == (3, 70)
    assert f"3 steps on 70 images: mark loss {measured['mark_loss']:.4f}" in output
    assert f"{measured['found']} of {measured['calibration_images']}\n" in output
    assert load_trigger(out / "trigger.safetensors")(images(2)).shape == (2, 1, 16, 16)
    report = tmp_path / "found.json"
    detector = str(out / "detector.safetensors")
    assert main(["detect", str(photos), "--detector", detector, "--json", str(report)]) == 0
    assert len(json.loads(report.read_text())["images"]) == 120
    assert "of 120 images are marked" in capsys.readouterr().out
    # Files that are no pictures are named, all of them, and stop nothing but a training.
    for name in ("3.png", "7.png"):
        (photos / name).write_bytes(b"no picture")
    (photos / "notes.txt").write_text("x")
    assert main(["detect", str(photos), "--detector", detector, "--json", str(report)]) == 0
    output, measured = capsys.readouterr().out, json.loads(report.read_text())
    assert (
        "of 118 images are marked" in output and "not looked at: 1 no image (notes.txt)" in output
    )
    assert [row["file"] for row in measured["unread"]] == ["3.png", "7.png"]
    assert main(["train", str(photos), "--out", str(tmp_path / "new"), *arguments]) == 1
    assert "cannot read 2 of 120 images: 2 no picture (3.png, 7.png)" in capsys.readouterr().err
    for path in photos.glob("*.png"):
        path.write_bytes(b"no picture")
    assert main(["detect", str(photos), "--detector", detector]) == 1


def test_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["detect", str(tmp_path), "--detector", str(tmp_path / "no.safetensors")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["train"])
    assert caught.value.code == 64
