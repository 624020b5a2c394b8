"""A small made-up study for the tests of what is rendered. No figure in it was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from wm_eval.detectors import DETECTORS
from wm_eval.pictures import save_picture
from wm_eval.records import Record, write_record

CORRUPTIONS = ("none", "mask", "rotation")


def metrics(cda: float, asr: float, ftr: float = 0.01) -> dict:
    def around(rate: float) -> list[float]:
        return [max(0.0, rate - 0.02), min(1.0, rate + 0.02)]

    return {
        "cda": cda,
        "asr": asr,
        "ftr": ftr,
        "n_clean": 597,
        "n_attack": 538,
        "cda_interval": around(cda),
        "asr_interval": around(asr),
        "ftr_interval": around(ftr),
    }


def difference(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 597}


def scan(defence: str, victim: str, picture: dict) -> dict:
    named = [0] if victim == "backdoored" and defence == "reverse" else []
    labels = [
        {
            "label": k,
            "score": 0.01 if k in named else 0.1 + k / 100,
            "success_rate": 0.99,
            "p_value": 0.001 if k in named else 1.0,
            "paper_index": None if k == 3 else 0.4,
            "ratio": 0.1 if k in named else 1.0,
            "converged": k != 3,
        }
        for k in range(4)
    ]
    return {
        "defence": defence,
        "victim": victim,
        "verdict": "backdoored" if named else "clean",
        "labels": labels,
        "suspected": named,
        "p_value": 0.001 if named else 1.0,
        "paper_index": 2.4,
        "paper_index_low": 2.6,
        "paper_flagged": [0],
        "alpha": 0.05,
        "max_ratio": 0.5,
        "score_median": 0.11,
        "paper_line": 0.03,
        "true_target": 0,
        "n_images": 100,
        "reason": "a made-up reason.",
        "pictures": {str(k): picture for k in range(4)},
        "files": {},
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    image = torch.linspace(0, 1, 64).view(1, 8, 8).clone()
    picture = save_picture(folder / "pictures", "one", image, "a <made-up> picture")
    kinds = ("original", "poisoned", "residual", "extracted", "extracted-clean")
    stealth = {name: {"mean": 40.0, "p05": 38.5, "p95": 41.0} for name in ("psnr", "ssim", "linf")}
    bits = {
        name: {
            "marked": 0.99,
            "unmarked": 0.5,
            "false_positives": 0,
            "true_positives": 298,
            "false_n": 298,
        }
        for name in CORRUPTIONS
    }
    values = {
        "data": {
            "name": "digits",
            "n_train": 1200,
            "n_test": 597,
            "classes": list("0123"),
            "image_size": 32,
            "channels": 1,
        },
        "watermark": {
            "n": 597,
            "constant_score": 0.5,
            "stealth": {**stealth, "lpips": None, "lpips_absent": "no weights"},
            "bits": bits,
            "detection": {
                "threshold": 1.25,
                "aimed_fpr": 0.001,
                "n_calibration": 299,
                "n": 298,
                "true_positives": 298,
                "tpr": 1.0,
                "tpr_lower": 0.99,
                "false_positives": 0,
                "fpr": 0.0,
                "fpr_upper": 0.01,
            },
            "pictures": {
                "gain": 10,
                "watermark": picture,
                "rows": [dict.fromkeys(kinds, picture)] * 2,
            },
        },
        "robustness": {
            "target": 0,
            "label_map": "all-to-one",
            "victims": {
                "clean": {name: metrics(0.97, 0.02) for name in CORRUPTIONS},
                "backdoored": {name: metrics(0.965, 0.99) for name in CORRUPTIONS},
            },
            "cda_gap": {name: difference(-0.005) for name in CORRUPTIONS},
        },
        "exports": {
            "tolerance": 1e-4,
            "models": {
                "classifier": {
                    "onnx": {
                        "file": "exports/classifier.onnx",
                        "relative": True,
                        "max_abs": 2e-6,
                        "max_rel": 3e-7,
                        "batches": [1, 5],
                    }
                }
            },
            "absent": {"generator": "the scan named no label"},
        },
        "cleaning-nc": {"done": False, "why": "the scan named no label", "label": None},
        "cleaning-reverse": {
            "done": True,
            "why": "the scan named label 0",
            "label": 0,
            "before": metrics(0.965, 0.99),
            "after": metrics(0.96, 0.01),
            "control": metrics(0.96, 0.6),
            "cda_change": difference(-0.005),
            "asr_change": difference(-0.98),
        },
    }
    for defence in ("nc", "reverse"):
        for victim in ("clean", "backdoored"):
            values[f"scan-{defence}-{victim}"] = scan(defence, victim, picture)
    for name, content in values.items():
        record = Record(name, {"settings": {"name": "made-up"}}, 0, "abc", content)
        write_record(folder / "records" / f"{name}.json", record, environment={"seconds": 1.0})
    return folder


class MadeUp(NamedTuple):
    """A detector of the table with another ``scan(name, model, images, **arguments)``."""

    name: str
    settings: dict[str, Any]
    alpha: float
    answer: Callable[..., Any]

    def scan(self, model: Any, images: Any, **given: Any) -> Any:
        return self.answer(self.name, model, images, alpha=self.alpha, **given)


@pytest.fixture(scope="session")
def make_up_scans() -> Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]:
    """Replaces the scan of every detector in the table."""

    def replace_all(monkeypatch: pytest.MonkeyPatch, scan: Callable[..., Any]) -> None:
        def preset_of(name: str, real: Callable[..., Any]) -> Callable[..., MadeUp]:
            def preset(preset: str = "fast", *, alpha: float = 0.05, **changes: Any) -> MadeUp:
                return MadeUp(name, dict(real(preset, **changes).settings), alpha, scan)

            return preset

        for name, entry in list(DETECTORS.items()):
            monkeypatch.setitem(
                DETECTORS, name, entry._replace(preset=preset_of(name, entry.preset))
            )

    return replace_all
