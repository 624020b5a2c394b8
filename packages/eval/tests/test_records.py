from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from wm_eval.records import (
    Record,
    canonical_json,
    hardware,
    read_record,
    read_records,
    versions,
    write_record,
)


def record(**changes: object) -> Record:
    given: dict = {
        "what": "victim-clean",
        "config": {"epochs": 3, "lr": 0.1},
        "seed": 0,
        "data": "abc",
        "values": {"cda": 1 / 3, "n": 597, "note": "café", "none": None, "list": [1, 2.5]},
    }
    return Record(**{**given, **changes})


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", record(), environment={"seconds": 1.5})
    back = read_record(tmp_path / "a.json")
    assert back.values["cda"] == 0.333333333
    assert back.key == record().key
    assert back.versions == versions()
    assert set(os.listdir(tmp_path)) == {"a.json", "a.env.json"}


def test_the_bytes_do_not_depend_on_order_wall_time_or_the_last_bit(tmp_path: Path) -> None:
    values = dict(reversed(record().values.items()))
    values["cda"] = values["cda"] + 1e-16
    write_record(tmp_path / "a.json", record(), environment={"seconds": 1.0})
    write_record(tmp_path / "b.json", record(values=values), environment={"seconds": 2.0})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


def test_writing_what_was_read_changes_no_byte(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", record())
    write_record(tmp_path / "b.json", read_record(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_key_follows_everything_but_the_values() -> None:
    base = record().key
    assert record(values={}).key == base
    for change in ({"seed": 1}, {"data": "x"}, {"config": {}}, {"what": "x"}, {"versions": {}}):
        assert record(**change).key != base


def test_read_records_leaves_the_environment_out(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_record(tmp_path / f"{name}.json", record(), environment={"seconds": 1.0})
    assert list(read_records(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "changes",
    [
        {"what": "No Name"},
        {"what": "../up"},
        {"seed": -1},
        {"seed": 1.0},
        {"values": {"x": float("nan")}},
        {"values": {"x": float("inf")}},
        {"values": {"x": object()}},
        {"values": {1: 2}},
    ],
)
def test_content_that_is_no_record_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        record(**changes)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="found none"):
        read_record(tmp_path / "missing.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not a record"):
        read_record(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"what": "x", "extra": 1}))
    with pytest.raises(ValueError, match="is not a record: expected config"):
        read_records(tmp_path)
    for name in ("a.txt", "a.env.json"):
        with pytest.raises(ValueError, match=r"expected a path NAME\.json"):
            write_record(tmp_path / name, record())


def test_hardware_names_the_machine() -> None:
    assert hardware("cpu")["device"] == "cpu"
    with pytest.raises(ValueError, match="expected device"):
        hardware("tpu")


def test_canonical_json_is_stable() -> None:
    assert canonical_json({"b": 0.1 + 0.2, "a": [True, None]}) == (
        '{\n  "a": [\n    true,\n    null\n  ],\n  "b": 0.3\n}\n'
    )
