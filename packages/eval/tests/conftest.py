"""A small made-up study of one watermark. No number in it was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from wm_eval.detectors import DETECTORS
from wm_eval.pictures import save_picture
from wm_eval.records import Record

CORRUPTIONS = ("none", "mask", "rotation")


def metrics(cda: float, asr: float, ftr: float = 0.01) -> dict[str, Any]:
    rates = {"cda": cda, "asr": asr, "ftr": ftr}
    intervals = {
        f"{name}_interval": [max(0.0, rate - 0.02), min(1.0, rate + 0.02)]
        for name, rate in rates.items()
    }
    return {**rates, **intervals, "n_clean": 597, "n_attack": 538}


def difference(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 597}


def scan(suspected: list[int]) -> dict[str, Any]:
    labels = [
        {
            "label": k,
            "score": 0.01 if k in suspected else 0.1 + k / 100,
            "success_rate": 0.99,
            "p_value": 0.001 if k in suspected else 1.0,
            "paper_index": None if k == 3 else 0.4,
            "ratio": 0.1 if k in suspected else 1.0,
            "converged": k != 3,
        }
        for k in range(4)
    ]
    return {
        "verdict": "backdoored" if suspected else "clean",
        "labels": labels,
        "suspected": suspected,
        "p_value": 0.001 if suspected else 1.0,
        "paper_index": 2.4,
        "paper_index_low": 2.6,
        "paper_flagged": [0],
        "max_ratio": 0.5,
        "score_median": 0.11,
        "paper_line": 0.03,
        "true_target": 0,
        "n_images": 100,
        "reason": "a made-up reason.",
    }


def write(folder: Path, kind: str, values: dict[str, Any], data: str = "abc", **key: Any) -> None:
    """Add a record to a folder."""
    record = Record(kind, key, {"name": "made-up"}, {}, data, values)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(record.line)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder of a finished study."""
    folder = tmp_path / "study"
    image = torch.linspace(0, 1, 64).view(1, 8, 8).clone()
    picture = save_picture(folder / "pictures", "one", image, "a <made-up> picture")
    kinds = ("original", "poisoned", "residual", "extracted", "extracted-clean")
    stealth = {name: {"mean": 40.0, "p05": 38.5, "p95": 41.0} for name in ("psnr", "ssim", "linf")}
    counts = {"false_positives": 0, "true_positives": 298, "false_n": 298}
    images = {"name": "digits", "n_train": 1200, "n_test": 597, "image_size": 32, "channels": 1}
    mark = {
        "n": 597,
        "constant_score": 0.5,
        "bits": {name: {"marked": 0.99, "unmarked": 0.5, **counts} for name in CORRUPTIONS},
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
    }
    parity = {"relative": True, "max_abs": 2e-6, "max_rel": 3e-7, "batches": [1, 5]}
    exports = {
        "tolerance": 1e-4,
        "models": {"classifier": {"onnx": {"file": "exports/classifier.onnx", **parity}}},
        "absent": {"generator": "the scan named no label"},
    }
    attack = {"attack": "watermark", "seed": 0}
    victim = {**attack, "corruptions": "plain"}
    clean = {"attack": "clean", "corruptions": "plain", "seed": 0}
    write(folder, "images", images | {"classes": list("0123")})
    none = {"lpips": None, "lpips_absent": "no weights"}
    write(folder, "stealth", {"n": 597, "stealth": stealth | none}, **attack)
    write(folder, "mark", mark, **attack)
    rows = [dict.fromkeys(kinds, picture)] * 2
    write(folder, "tiles", {"gain": 10, "watermark": picture, "tiles": rows}, **attack)
    rates = {name: metrics(0.97, 0.02) for name in CORRUPTIONS}
    write(folder, "rates", {"target": 0, "corruptions": rates}, trigger="watermark", **clean)
    rates = {name: metrics(0.965, 0.99) for name in CORRUPTIONS}
    gaps = {name: difference(-0.005) for name in CORRUPTIONS}
    write(folder, "rates", {"target": 0, "corruptions": rates, "cda_gap": gaps}, **victim)
    for detector, suspected in (("nc", []), ("reverse", [0])):
        for key, labels in ((clean, []), (victim, suspected)):
            pictures = {str(k): picture for k in range(4)}
            write(folder, "scan", scan(labels), detector=detector, **key)
            write(folder, "reversed", {"pictures": pictures}, detector=detector, **key)
    done = {
        "done": True,
        "why": "the scan named label 0",
        "labels": [0],
        "before": metrics(0.965, 0.99),
        "after": metrics(0.96, 0.01),
        "cda_change": difference(-0.005),
        "asr_change": difference(-0.98),
    }
    way = {**victim, "fraction": 0.5, "oracle_label": False}
    not_done = {"done": False, "why": "the scan named no label", "labels": []}
    write(folder, "mitigation", not_done, method="unlearning-nc", **way)
    write(folder, "mitigation", done, method="unlearning-reverse", **way)
    control = {"done": True, "after": metrics(0.96, 0.6)}
    write(folder, "mitigation", control, method="control", **way)
    write(folder, "exports", exports, **victim)
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
