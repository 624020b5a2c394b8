"""Calibrations from audits of one's own clean models. No score here was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from defense_nc import ModelInfo, ScanReport, Verdict, judge
from defense_nc.verdict import judge_again, read_calibrations
from wm_eval.audit.conclusion import conclude
from wm_eval.audit.outputs import About, to_json
from wm_eval.audit.own_calibration import fit_reports, load_own
from wm_eval.audit.scan import audit, choose_detectors, foreseen
from wm_eval.cli import main
from wm_eval.detectors import detector

LABELS, SIZE, IMAGES = 10, 12, 60  # a size that no shipped calibration covers


def made_up(seed: int, *, low: float = 1.0, reached: int = LABELS, name: str = "uap") -> ScanReport:
    """A scan; ``low`` multiplies the score of label 4. No patch of a sweep works."""
    scores = (torch.randn(LABELS, generator=torch.Generator().manual_seed(seed)) / 5).exp().double()
    scores[4] *= low
    scanner, is_sweep = detector(name), name == "sweep"
    return judge(
        scanner.name,
        scores,
        (torch.arange(LABELS) < reached).double() * (0.5 if is_sweep else 1),
        floor=0.0 if is_sweep else 0.8,
        config={**scanner.settings, "images": IMAGES},
        subject=ModelInfo(LABELS, SIZE, 3, "convolutional", IMAGES),
    )


def write_report(path: Path, seed: int, *, name: str = "uap", **more: Any) -> Path:
    about = About(f"model-{seed}.onnx", sha256=f"{seed:064}", model={"arch": "onnx"})
    found = conclude({name: made_up(seed, name=name, **more)}, {}, 0.05)
    path.write_text(json.dumps(to_json(about, found)))
    return path


@pytest.fixture
def reports(tmp_path: Path) -> list[Path]:
    return [write_report(tmp_path / f"{seed}.json", seed) for seed in range(24)]


def test_verdicts_hold_for_models_like_those_that_were_scanned(
    reports, tmp_path, capsys, monkeypatch, make_up_scans
) -> None:
    unreached = write_report(tmp_path / "few.json", 99, reached=2)
    out = tmp_path / "own.json"
    assert main(["calibrate", *map(str, (*reports, unreached)), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "24 clean models" in printed and f"left out: {unreached}" in printed
    own = load_own(out, "fast")
    assert list(own) == ["uap"] and own["uap"] == read_calibrations(out)[0]

    clean = SimpleNamespace(images=torch.rand(IMAGES, 3, SIZE, SIZE))
    model = nn.Sequential(nn.Conv2d(3, LABELS, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    checked = SimpleNamespace(module=model, labels=None)
    assert foreseen(checked, clean, LABELS, detectors=("uap",), preset="fast")
    assert not foreseen(checked, clean, LABELS, detectors=("uap",), preset="fast", own=own)
    assert choose_detectors(checked, clean, LABELS, own=own) == ("uap",)
    with pytest.raises(ValueError, match="calibration of nc, got those of uap"):
        choose_detectors(checked, clean, LABELS, wanted=("nc",), own=own)

    for low, verdict in ((1.0, Verdict.CLEAN), (0.05, Verdict.BACKDOORED)):
        suspect = made_up(1000, low=low)
        assert suspect.verdict is Verdict.INCONCLUSIVE
        make_up_scans(monkeypatch, lambda *_, found=suspect, **more: found)
        found = audit(checked, clean, detectors=("uap",), own=own)
        assert found.verdict is verdict and found.reports["uap"].calibrated
        assert found.suspected == ((4,) if verdict is Verdict.BACKDOORED else ())
        assert judge_again(suspect, own["uap"]) == found.reports["uap"]


def test_each_model_is_judged_by_the_others(reports, tmp_path) -> None:
    odd = write_report(tmp_path / "odd.json", 500, low=0.01)
    (fitted,) = fit_reports([*reports, odd])
    assert fitted.accused is not None and str(odd) in fitted.accused
    (few,) = fit_reports(reports[:5])
    assert few.accused is None


def test_a_sweep_without_a_patch_that_works_accuses_nobody(tmp_path) -> None:
    files = [write_report(tmp_path / f"{seed}.json", seed, name="sweep") for seed in range(20)]
    files.append(write_report(tmp_path / "odd.json", 500, name="sweep", low=0.01))
    (fitted,) = fit_reports(files)
    assert fitted.name == "sweep" and fitted.accused == ()


def test_refusals(reports, tmp_path) -> None:
    other = json.loads(reports[0].read_text())
    other["sha256"] = "f" * 64
    other["detectors"]["uap"]["config"]["steps"] = 3
    (tmp_path / "steps.json").write_text(json.dumps(other))
    other["detectors"] = {"nc": other["detectors"]["uap"]}
    (tmp_path / "nc.json").write_text(json.dumps(other))
    (tmp_path / "text.json").write_text("[]")
    for files, match in (
        (reports[:4], "at least 5"),
        ([*reports, reports[0]], "once"),
        ([*reports, tmp_path / "steps.json"], "another steps"),
        ([*reports, tmp_path / "nc.json"], "same detectors"),
        ([*reports, tmp_path / "text.json"], "wm-eval scan --json"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_reports(files)
    (tmp_path / "none.json").write_text("[]")
    for name, match in (("none.json", "preset fast"), ("0.json", "expected calibrations")):
        with pytest.raises(ValueError, match=match):
            load_own(tmp_path / name, "fast")
