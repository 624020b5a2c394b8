"""Sections of the results page about exported files and speed: what they show, and when nothing."""

from __future__ import annotations

import json

import pytest

from wm_eval.artefact_section import COLUMNS, artefact_parts
from wm_eval.records import Record, write_record
from wm_eval.speed_section import RECORD, speed_parts

ROW = {"artefact": "injector", "relative": False, "tolerance": 1e-4}


def artefact_rows():
    rows = []
    for place, (form, precision, uint8) in enumerate(COLUMNS):
        row = ROW | {"form": form, "precision": precision, "uint8": uint8}
        values = {"max_abs": place * 1e-4, "max_rel": 0.5}
        rows.append(row | ({"absent": "no products"} if precision == "int8" else values))
    return rows


@pytest.fixture
def artefacts(tmp_path):
    injector = {
        "injector": "int8, uint8",
        "n": 90,
        "psnr": 36.181,
        "found_by_torch": 0.9989,
        "found_by_file": 0.9978,
        "asr_by_torch": 0.9652,
        "asr_by_file": 0.9663,
        "values_differing": 0.0845,
        "largest_step": 2,
    }
    found = {
        "filter": "reverse",
        "trained_on": "no",
        "stated_rate": 0.01,
        "images": 500,
        "false_alarms": 8,
        "n_clean": 1000,
        "hits": 990,
        "n_poisoned": 1000,
    }
    for name, rows in (
        ("artefacts", artefact_rows()),
        ("injectors", [injector]),
        ("filters", [found]),
    ):
        record = Record(name, {}, 0, "digits", {name: rows, "files": {}})
        write_record(tmp_path / "records" / f"{name}.json", record, environment={})
    return tmp_path


def test_exported_files(artefacts):
    text = "\n".join(artefact_parts(artefacts))
    assert "| injector | 0 | 1.0e-04 | 2.0e-04 | – | 4.0e-04 | 5.0e-04 |" in text
    assert (
        "| ONNX, int8, uint8 | 36.18 | 99.89 % | 99.78 % | 96.52 % | 96.63 % | 8.45 % | 2 |" in text
    )
    assert "| Reverse generators | new ones | 1.0 % | 0.8 % (0.4 to 1.6) | 99.0 %" in text
    assert "90 test images" in text and "500 clean images" in text


def test_speed(tmp_path):
    share = {
        "images_per_second": 212.3,
        "fraction_of_matmul": 0.8255,
        "fraction_spread": 0.0063,
        "fraction_of_torch_mm": 0.8693,
        "matmul": "oneDNN 2048x2048x2048 bfloat16",
    }
    served = {
        "images_a_second_alone": 2250,
        "images_a_second_served": 1810,
        "served_times_alone": 0.804,
        "goal": 0.3,
    }
    record = {
        "processor": "a processor",
        "versions": {"torch": "2"},
        "benchmarks": {
            "packages/a/bench.py::test_injector[base-32-fast]": share,
            "packages/a/bench.py::test_served_against_the_model_alone[1-0.3]": served,
            "packages/a/bench.py::test_ratio": {"times": 2.0},
        },
    }
    (tmp_path / RECORD).write_text(json.dumps(record))
    text = "\n".join(speed_parts(tmp_path))
    assert "| injector, base-32-fast | 212 | 0.83 | 0.006 | 0.87 |" in text
    assert "| 1 | 2250 | 1810 | 0.80 | 0.30 |" in text
    assert "ratio" not in text.split("## Share")[1].split("Seconds of the")[0]
    assert "One thread of: a processor; torch 2." in text


def test_nothing_without_records(tmp_path):
    assert artefact_parts(tmp_path) == [] and speed_parts(tmp_path) == []
