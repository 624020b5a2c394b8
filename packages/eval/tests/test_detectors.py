"""The table of detectors: nothing is imported before it is used, and every scan is asked alike."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from defense_nc import NCConfig
from defense_reverse import ReverseConfig
from wm_eval import detectors
from wm_eval.detectors import DETECTORS, Detector, detector


def test_every_detector_stands_under_its_name() -> None:
    assert {"nc", "reverse", "reverse-lpips", "feature-re", "bti-dbf"} == set(DETECTORS)
    assert all(name == one.name for name, one in DETECTORS.items())
    assert detector("nc") is DETECTORS["nc"]
    with pytest.raises(ValueError, match=r"expected a detector in nc, reverse, .*, got 'strip'"):
        detector("strip")


def test_the_table_imports_no_detector() -> None:
    program = (
        "import sys, wm_eval.detectors\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'defense_nc', 'defense_reverse')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_settings_come_from_presets() -> None:
    assert detector("nc").config("fast", steps=7) == NCConfig.preset("fast", steps=7)
    assert detector("reverse").config("paper") == ReverseConfig.preset("paper")
    with pytest.raises(ValueError, match="got 'vast'"):
        detector("nc").config("vast")


def test_lpips_differs_from_the_plain_detector_in_lambda_3_alone() -> None:
    plain, perceptual = (detector(name).config("fast") for name in ("reverse", "reverse-lpips"))
    assert (plain.lambdas[2], perceptual.lambdas[2]) == (0.0, 0.1)
    assert perceptual.lambdas[:2] == plain.lambdas[:2] and perceptual.steps == plain.steps


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_scan_gets_what_it_knows(monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    seen: dict[str, Any] = {}

    def short(model: Any, images: Any, **given: Any) -> str:
        seen.update(given)
        return "report"

    def long(model: Any, images: Any, *, checkpoint: Any = None, **given: Any) -> str:
        seen.update(given, checkpoint=checkpoint)
        return "report"

    module = SimpleNamespace(scan=long if goes_on else short, Settings=Preset)
    monkeypatch.setattr(detectors, "import_module", lambda name: module)
    one = Detector("one", "One", "module", "module:Settings", {"fast": "small"})
    arguments: dict[str, Any] = {"labels": None, "seed": 3, "progress": False, "device": "cpu"}
    found = one.scan(
        torch.nn.Identity(), torch.zeros(1), preset="fast", checkpoint="a file", **arguments
    )
    assert found == "report"
    wanted = {**arguments, "config": "small", "alpha": 0.05}
    assert seen == (wanted | {"checkpoint": "a file"} if goes_on else wanted)
    seen.pop("checkpoint", None)
    alone = SimpleNamespace(engine="single")  # one label after another, from the start
    one.scan(torch.nn.Identity(), torch.zeros(1), config=alone, checkpoint="a file")
    assert seen.get("checkpoint") is None
    one.scan(torch.nn.Identity(), torch.zeros(1), config="mine", alpha=0.1)
    assert (seen["config"], seen["alpha"]) == ("mine", 0.1)


class Preset:
    """Stands in for a detector's settings."""

    @staticmethod
    def preset(name: str) -> str:
        return name
