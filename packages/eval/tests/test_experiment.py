"""A study from end to end: with stand-ins for all that trains (fast), and for real (slow)."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, NCConfig, Repaired, Unlearning, judge
from defense_reverse import ReverseConfig
from wm_eval import experiment, stages
from wm_eval.config import (
    DataConfig,
    DefenceConfig,
    MeasureConfig,
    StudyConfig,
    VictimConfig,
    plain,
)
from wm_eval.experiment import run_study
from wm_eval.presets import study_preset
from wm_eval.stages import chosen_label
from wm_eval.workspace import Made
from wm_extract import JointConfig, JointLosses, JointResult, UNetExtractor
from wm_inject import (
    WatermarkTrigger,
    default_watermark,
    load_trigger,
    pretrained_card,
    save_image,
)
from wm_victim import TrainConfig, TrainHistory

STAGES = [
    "cleaning-nc",
    "cleaning-reverse",
    "data",
    "exports",
    "injector",
    "robustness",
    "scan-nc-backdoored",
    "scan-nc-clean",
    "scan-reverse-backdoored",
    "scan-reverse-clean",
    "victim-backdoored",
    "victim-clean",
    "watermark",
]
EXPORTED = {"tolerance": 1e-4, "models": {}, "absent": {"generator": "a stand-in"}}
# The second cleaning is the control.
SCANNED = ["scan", "scan", "cleaning", "cleaning"]
TINY = StudyConfig(
    name="tiny",
    joint=JointConfig(iterations=2, depth=1, decoder_depth=1, extractor_width=4),
    victim=VictimConfig(width=8),
    train=TrainConfig(epochs=1, batch_size=64, precision="float32"),
    measure=MeasureConfig(corruptions=("rotation",), limit=100, pictures=2),
    defence=DefenceConfig(images=64, cleaning_images=64),
    nc=NCConfig(steps=2, batches=1),
    reverse=ReverseConfig(width=4, depth=1, pretrain_steps=2, steps=2),
    nc_cleaning=Unlearning.preset("paper"),
    reverse_cleaning=Unlearning.preset("paper"),
)


@dataclass(frozen=True)
class Scanner:
    """A detector that scans as it is told."""

    scan: Callable[..., Any]
    config: Any = None


class Fakes:
    """Stand-ins that count their calls; ``kill`` names one that dies when it is called."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, named: int | None, kill: str = ""
    ) -> None:
        self.calls: list[str] = []
        self.named, self.kill = named, kill
        monkeypatch.setattr(stages, "train_jointly", self.train_jointly)
        monkeypatch.setattr(stages, "train_classifier", self.train_classifier)
        monkeypatch.setattr(Unlearning, "repair", self.clean)
        monkeypatch.setattr(stages, "detector", lambda name, **_: Scanner(self.scan))
        monkeypatch.setattr(experiment, "export_models", lambda _: Made(EXPORTED))

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.kill:
            raise KeyboardInterrupt

    def train_jointly(self, images, *, config, watermark, seed, checkpoint, progress):
        self.called("joint")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            injector = config.injector(image_size=images.shape[2], channels=images.shape[1]).eval()
            extractor = UNetExtractor(channels=images.shape[1], width=4).eval()
        mark = default_watermark(images.shape[2]) if watermark is None else watermark
        return JointResult(injector, extractor, mark, (JointLosses(1, 0.1, 0.2, 0.3),))

    def train_classifier(self, model, data, *, config, plan=None, **rest):
        self.called("clean" if plan is None else "backdoored")
        assert config.seed == 3 and (plan is None or plan.seed == 3)
        model.eval()
        return TrainHistory((1.0,), (0.1,), (9.9,))

    def scan(self, model: nn.Module, images, *, labels, seed, **settings):
        self.called("scan")
        scores = torch.linspace(50, 60, 10)
        if self.named is not None:
            scores[self.named] = 5.0
        mask = torch.zeros(1, *images.shape[2:])
        trigger = InvertedTrigger(mask, torch.ones(images.shape[1:]), success_rate=1.0)
        triggers = {label: copy.deepcopy(trigger) for label in range(10)}
        return judge("fake", scores, torch.ones(10), floor=0.9, triggers=triggers, seed=seed)

    def clean(self, model, images, labels, *, triggers, seed):
        self.called("cleaning")
        (trigger,) = triggers.values()
        assert isinstance(trigger, InvertedTrigger | stages.NoTrigger)
        return Repaired(copy.deepcopy(model), {})


def study_bytes(folder: Path) -> dict[str, bytes]:
    keep = [*folder.glob("records/*.json"), *folder.rglob("*.png"), *folder.glob("*.html")]
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in [*keep, *folder.rglob("*.safetensors")]
        if not p.name.endswith(".env.json")
    }


CONFIG = replace(TINY, seed=3)


def test_every_stage_leaves_a_record_and_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(monkeypatch, named=4)
    result = run_study(CONFIG, tmp_path, progress=False)
    assert sorted(result.records) == STAGES
    assert fakes.calls == ["joint", "clean", "backdoored", *SCANNED, *SCANNED]
    first = study_bytes(tmp_path)
    again = run_study(CONFIG, tmp_path, progress=False)
    assert len(fakes.calls) == 11 and study_bytes(tmp_path) == first
    assert again.records == result.records
    assert "http" not in result.report.read_text(encoding="utf-8").replace("http-equiv", "")
    for path in tmp_path.glob("records/*.json"):
        if not path.name.endswith(".env.json"):
            assert "seconds" not in path.read_text(encoding="utf-8")


def test_a_study_may_start_from_ready_made_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(monkeypatch, named=4)
    ready = replace(CONFIG, pretrained="tiny-32-grey")
    result = run_study(ready, tmp_path, progress=False)
    assert sorted(result.records) == STAGES
    assert fakes.calls == ["clean", "backdoored", *SCANNED, *SCANNED]
    record, card = result.records["injector"], pretrained_card("tiny-32-grey")
    assert record.config["settings"]["pretrained"] == "tiny-32-grey"
    assert record.config["settings"]["card"] == card["sha256"]
    assert record.values["trained_on"] == card["data"] and card["data"]
    kept = load_trigger(tmp_path / "models/trigger.safetensors").state_dict()
    for name, value in WatermarkTrigger.from_pretrained("tiny-32-grey").state_dict().items():
        assert torch.equal(kept[name], value)
    first = study_bytes(tmp_path)
    run_study(ready, tmp_path, progress=False)
    assert len(fakes.calls) == 10 and study_bytes(tmp_path) == first


def test_ready_made_weights_fit_the_images_or_are_refused(tmp_path: Path) -> None:
    for settings, told in (
        (
            {"pretrained": "tiny-32"},
            "of 3 channels and 32 px for the weights tiny-32, got 1 and 32",
        ),
        ({"pretrained": "tiny-32-grey", "data": DataConfig(image_size=28)}, "got 1 and 28"),
    ):
        with pytest.raises(ValueError, match=told):
            run_study(replace(CONFIG, **settings), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"expected pretrained weights in .*'huge'"):
        replace(CONFIG, pretrained="huge")
    with pytest.raises(ValueError, match="expected pretrained or a watermark"):
        replace(CONFIG, pretrained="tiny-32-grey", watermark="a.png")


def test_studies_from_before_keep_their_settings() -> None:
    assert "pretrained" not in plain(study_preset("demo"))
    assert plain(study_preset("demo-pretrained"))["pretrained"] == "tiny-32-grey"


def test_only_a_named_label_is_used_for_cleaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(monkeypatch, named=None)
    result = run_study(CONFIG, tmp_path, progress=False)
    assert "cleaning" not in fakes.calls
    for defence in ("nc", "reverse"):
        values = result.records[f"cleaning-{defence}"].values
        assert values["done"] is False and values["label"] is None
        assert values["why"].startswith("the scan named no label (clean: ")
    assert "Not cleaned: no scan named a label." in result.report.read_text(encoding="utf-8")


def test_a_wrong_label_is_cleaned_with_as_the_scan_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fakes(monkeypatch, named=7)
    values = run_study(CONFIG, tmp_path, progress=False).records["cleaning-nc"].values
    assert (values["done"], values["label"]) == (True, 7)
    assert values["before"] == values["after"] and values["cda_change"]["value"] == 0


def test_a_killed_study_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fakes(monkeypatch, named=4)
    run_study(CONFIG, tmp_path / "whole", progress=False)
    calls = 0
    for kill in ("backdoored", "cleaning"):
        killed = Fakes(monkeypatch, named=4, kill=kill)
        with pytest.raises(KeyboardInterrupt):
            run_study(CONFIG, tmp_path / "killed", progress=False)
        calls += len(killed.calls) - 1  # the call that died is made again
    rest = Fakes(monkeypatch, named=4)
    run_study(CONFIG, tmp_path / "killed", progress=False)
    assert calls + len(rest.calls) == 11
    assert study_bytes(tmp_path / "killed") == study_bytes(tmp_path / "whole")


def test_other_settings_do_again_what_they_touch_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(monkeypatch, named=4)
    run_study(CONFIG, tmp_path, progress=False)
    fakes.calls.clear()
    run_study(replace(CONFIG, nc=NCConfig(steps=3)), tmp_path, progress=False)
    assert fakes.calls == SCANNED


def test_a_target_that_is_no_class_is_refused_at_once(tmp_path: Path) -> None:
    wrong = replace(TINY, plan=replace(TINY.plan, target=10))
    with pytest.raises(ValueError, match="below 10 classes, got 10"):
        run_study(wrong, tmp_path)
    with pytest.raises(ValueError, match="expected device"):
        run_study(TINY, tmp_path, device="tpu")
    assert not list(tmp_path.iterdir())


def test_another_picture_under_the_same_name_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "mark.png"
    config = replace(CONFIG, watermark=str(picture))
    with pytest.raises(ValueError, match="expected a file at"):
        run_study(config, tmp_path / "study", progress=False)
    fakes = Fakes(monkeypatch, named=None)
    for shade, times in ((0, 1), (0, 1), (90, 2)):
        pixels = np.zeros((32, 32, 1), np.uint8)
        pixels[8:24, 8:24] = 255
        pixels[0, 0] = shade
        save_image(picture, pixels)
        run_study(config, tmp_path / "study", progress=False)
        assert fakes.calls.count("joint") == times


def test_the_most_unusual_named_label_is_chosen() -> None:
    def label(k: int, p: float, ratio: float) -> dict:
        return {"label": k, "p_value": p, "ratio": ratio}

    labels = [label(0, 0.04, 0.1), label(1, 0.01, 0.3), label(2, 0.001, 0.2)]
    assert chosen_label({"labels": labels, "suspected": [0, 1]}) == 1
    assert chosen_label({"labels": labels, "suspected": []}) is None


@pytest.mark.slow
def test_a_tiny_study_of_real_digits_runs_for_real_and_resumes(tmp_path: Path) -> None:
    config = replace(
        TINY,
        joint=replace(TINY.joint, iterations=60),
        train=replace(TINY.train, epochs=3, batch_size=32, lr=0.03),
        nc=NCConfig(steps=20, batches=4, patience=2),
        reverse=replace(TINY.reverse, pretrain_steps=20, steps=20),
    )
    whole = run_study(config, tmp_path / "whole", progress=False)
    assert sorted(whole.records) == STAGES
    assert whole.records["robustness"].values["victims"]["clean"]["none"]["cda"] > 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in STAGES[:2] + STAGES[4:]:
        os.unlink(tmp_path / "half" / "records" / f"{name}.json")
    run_study(config, tmp_path / "half", progress=False)
    assert study_bytes(tmp_path / "half") == study_bytes(tmp_path / "whole")
    page = whole.report.read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
