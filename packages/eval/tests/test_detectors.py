"""The table of detectors: every one keeps the protocol."""

import dataclasses
import json

import pytest
import torch

from defense_nc import NeuralCleanse, ScanReport
from defense_nc.verdict import load_calibration
from wm_eval.detectors import DETECTORS, detector
from wm_eval.titles import CALIBRATED
from wm_eval.titles import DETECTORS as TITLES
from wm_victim.toy_backdoors import planted_classifier, planted_images


def test_detectors_are_found_by_their_short_names() -> None:
    assert list(DETECTORS) == list(TITLES) and set(CALIBRATED) < set(TITLES)
    assert detector("nc", "paper", steps=7, alpha=0.1) == NeuralCleanse.preset(
        "paper", steps=7, alpha=0.1
    )
    for wrong in ({"name": "strip"}, {"name": "nc", "preset": "vast"}):
        with pytest.raises(ValueError, match="nc" if len(wrong) == 1 else "preset"):
            detector(**wrong)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_has_the_same_presets_and_settings_for_a_record(name: str) -> None:
    paper, fast = (dict(detector(name, preset).settings) for preset in ("paper", "fast"))
    assert paper.keys() == fast.keys() and paper != fast
    assert json.loads(json.dumps(fast)) == fast
    assert dataclasses.is_dataclass(detector(name))
    assert detector(name) == DETECTORS[name].preset()


def test_lpips_differs_from_the_plain_detector_in_lambda_3_alone() -> None:
    plain, perceptual = (dict(detector(name).settings) for name in ("reverse", "reverse-lpips"))
    assert (plain["lambdas"][2], perceptual["lambdas"][2]) == (0.0, 0.1)
    assert plain["lambdas"][:2] == perceptual["lambdas"][:2]
    assert plain["steps"] == perceptual["steps"]


def test_a_scan_takes_the_arguments_of_the_protocol(tmp_path) -> None:
    data = planted_images(40, num_classes=3)
    model = planted_classifier("patch", num_classes=3)
    report = detector("nc", steps=1, batches=1).scan(
        model,
        data.images,
        labels=data.labels,
        seed=3,
        progress=False,
        device="cpu",
        checkpoint=tmp_path / "scan.safetensors",
    )
    assert isinstance(report, ScanReport) and report.seed == 3
    assert all(torch.is_tensor(trigger.mask) for trigger in report.triggers.values())


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_calibration_that_ships_is_found_by_the_settings(name: str) -> None:
    scanner = detector(name)
    assert load_calibration(scanner.name, settings=scanner.settings) is not None
