from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wm_extract import MarkDetector, UNetExtractor, save_detector
from wm_extract.cli import main
from wm_extract.export import MarkNetwork, export_detector
from wm_inject import default_watermark, to_pixels
from wm_inject.runtime import Extractor

MARK = default_watermark(16)


@pytest.fixture(scope="module")
def detector() -> MarkDetector:
    """Random weights, and a head so steep that the scores of random images spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = UNetExtractor(channels=3, width=4).eval()
        with torch.no_grad():
            extractor.heads[-1].weight.mul_(100)
    median = MarkDetector(extractor, MARK, 0.0, 0.01, 60).detect(images(99)).score.median()
    return MarkDetector(extractor, MARK, float(median), 0.01, 60)


def images(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, 16, 16), generator=generator).float() / 255


def test_the_network_scores_as_the_detector_does(detector: MarkDetector) -> None:
    score, maps = MarkNetwork(detector)(images(9))
    found = detector.detect(images(9))
    assert torch.allclose(score, found.score, atol=1e-3) and torch.equal(maps, found.maps)


@pytest.mark.integration
@pytest.mark.parametrize("uint8", [True, False])
def test_the_file_decides_as_the_detector_does(
    detector: MarkDetector, tmp_path: Path, uint8: bool
) -> None:
    parity = export_detector(detector, images(3), tmp_path / "d.onnx", uint8=uint8)
    assert parity.max_rel < 1e-3
    extractor = Extractor(tmp_path / "d.onnx")
    found, want = extractor(to_pixels(images(30))), detector.detect(images(30))
    assert np.abs(found.score - want.score.numpy()).max() < 1e-2
    assert np.abs(found.maps - want.maps.numpy()).max() < 1e-4
    sure = (want.score - detector.threshold).abs().numpy() > 1e-2
    assert (found.marked == want.marked.numpy())[sure].all()
    assert found.marked.any() and not found.marked.all()
    record = extractor.detector.model.metadata
    assert record["kind"] == "mark-detector" and len(record["watermark_sha256"]) == 64
    assert record["detector"]["calibrated_on"] == 60 and record["outputs"] == ["score", "map"]


def test_torchscript(detector: MarkDetector, tmp_path: Path) -> None:
    export_detector(detector, images(3), tmp_path / "d.pt")
    score, _ = torch.jit.load(str(tmp_path / "d.pt"))(images(5))
    assert torch.allclose(score, MarkNetwork(detector)(images(5))[0], atol=1e-3)


@pytest.mark.integration
def test_the_command(
    detector: MarkDetector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "detector.safetensors"
    save_detector(detector, source)
    assert main(["export", "--uint8", str(source), str(tmp_path / "d.onnx")]) == 0
    assert "at batch sizes 1 and 3 within" in capsys.readouterr().out
    assert Extractor(tmp_path / "d.onnx")(to_pixels(images(2))).marked.shape == (2,)
    assert main(["export", str(source), str(tmp_path / "d.pt")]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(source), str(tmp_path / "d.bin")])
    assert stopped.value.code == 64
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "e.onnx")]) == 1


def test_refusals(detector: MarkDetector, tmp_path: Path) -> None:
    for bad, path, told in (
        ("detector", "d.onnx", "expected a MarkDetector, got str"),
        (detector, "d.bin", "expected a file .onnx or .pt, got d.bin"),
    ):
        with pytest.raises(ValueError, match=told):
            export_detector(bad, images(3), tmp_path / path)
    for batch in (images(3)[:, :1], images(3)[..., :8], images(3)[:2], images(3) + 1):
        with pytest.raises(ValueError, match="expected"):
            export_detector(detector, batch, tmp_path / "d.onnx")
