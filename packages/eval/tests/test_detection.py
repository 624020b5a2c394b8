"""The detection experiment with stand-ins for all that trains; the real one is in results/."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from defense_nc import judge
from wm_eval import detection
from wm_eval.cli import main
from wm_eval.detection import DetectionConfig, run_detection, summarise_detection
from wm_eval.records import read_records
from wm_eval.stages import Defence
from wm_victim import TrainHistory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    def train(model, data, *, config, num_classes, plan=None, trigger=None, hook=None, **rest):
        made.append("wanet" if hook is not None else "badnets" if plan is not None else "none")
        model.eval()
        return TrainHistory((1.0,), (0.1,), (1.0,))

    victims = itertools.cycle(attack for _, attack in detection.PAIRS)

    def scan(model, images, *, labels, config, seed, progress):
        scores = torch.linspace(50, 60, 10)
        if next(victims) != "none":
            scores[0] = 5.0
        return judge("fake", scores, torch.ones(10), floor=0.9, seed=seed)

    monkeypatch.setattr(detection, "train_classifier", train)
    fake = {name: Defence(scan, lambda *_: None) for name in ("nc", "reverse")}
    monkeypatch.setattr(detection, "DEFENCES", fake)
    return made


CONFIG = DetectionConfig(data="digits", model="resnet10", width=8, seeds=(0, 1), images=50)


def test_every_pair_is_scanned_once_and_counted(tmp_path: Path, calls: list[str]) -> None:
    folder = run_detection(CONFIG, tmp_path, progress=False, say=lambda _: None)
    assert calls == ["none", "badnets", "wanet"] * 2
    rows = {(r["defence"], r["attack"]): r for r in summarise_detection(read_records(folder))}
    assert set(rows) == set(detection.PAIRS)
    assert all(r["n"] == 2 and r["named_other"] == 0 for r in rows.values())
    assert rows["reverse", "wanet"]["named_target"] == 2
    assert rows["nc", "none"]["named_target"] == 0
    run_detection(CONFIG, tmp_path, progress=False, say=lambda _: None)
    assert len(calls) == 6, "what is done is not done again"


def test_command_line(tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["detect", "--data", "digits", "--model", "resnet10", "--width", "8"]
    out = ["--seeds", "1", "--seed", "7", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*arguments, *out]) == 0
    assert "nc       on badnets  target named in 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "records" / "scan-reverse-wanet-7.json").is_file()


@pytest.mark.parametrize(
    "change",
    [{"pairs": ()}, {"pairs": (("nc", "refool"),)}, {"seeds": ()}, {"seeds": (-1,)}],
)
def test_refusals(change: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DetectionConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scan"):
        summarise_detection({})
