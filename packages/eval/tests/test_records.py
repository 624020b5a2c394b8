from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wm_eval.records import (
    Failure,
    Record,
    add_record,
    canonical_json,
    compact,
    hardware,
    read_environments,
    read_records,
    read_study,
    stage_id,
    versions,
    write_failures,
)

MACHINE = {"cpu": "a", "device": "cpu"}
VALUES = {"cda": 1 / 3, "n": 597, "note": "café\u2028", "none": None, "list": [1, 2.5]}


def record(seed: int = 0, **changes: Any) -> Record:
    given = {
        "kind": "victim",
        "key": {"attack": "wanet", "seed": seed},
        "settings": {"epochs": 3, "lr": 0.1},
        "inputs": {"trigger attack=wanet seed=0": "abc"},
        "data": "abc",
        "values": VALUES,
    }
    return Record(**{**given, **changes})


def test_records_come_back_as_they_were_added(tmp_path: Path) -> None:
    for seed in (1, 0):
        add_record(tmp_path, record(seed), MACHINE, 1.5)
    add_record(tmp_path, record(1, values={"cda": 0.5}), {**MACHINE, "cpu": "b"}, 2.5)
    compact(tmp_path)
    write_failures(tmp_path, {"x": Failure("scan", {"seed": 3}, "no luck")})
    study = read_study(tmp_path)
    assert [r.id for r in study.records] == [f"victim attack=wanet seed={k}" for k in (0, 1)]
    assert study.records[0].values == {**VALUES, "cda": 0.333333333}
    assert study.records[0].versions == versions()
    assert study.records[1].values == {"cda": 0.5}  # the last line of an id counts
    assert study.failures == (Failure("scan", {"seed": 3}, "no luck"),)
    assert read_environments(tmp_path) == {
        study.records[0].id: {"seconds": 1.5, **MACHINE},
        study.records[1].id: {"seconds": 2.5, "cpu": "b", "device": "cpu"},
    }
    assert len((tmp_path / "environments.jsonl").read_text().splitlines()) == 4
    write_failures(tmp_path, {})
    assert read_study(tmp_path).failures == ()


def test_select_and_one() -> None:
    from wm_eval.records import StudyRecords

    study = StudyRecords((record(0), record(1), record(0, kind="scan")))
    assert [r.key["seed"] for r in study.select("victim", attack="wanet")] == [0, 1]
    assert study.select(seed=0) == [study.records[0], study.records[2]]
    assert study.one("victim", seed=1) == record(1)
    assert study.one("victim", seed=7) is None
    with pytest.raises(ValueError, match="one victim"):
        study.one("victim", attack="wanet")


def test_the_bytes_depend_neither_on_order_nor_on_the_last_bit() -> None:
    values = {**dict(reversed(VALUES.items())), "cda": 1 / 3 + 1e-16}
    assert record(values=values).line == record().line
    assert Record(**json.loads(record().line)).line == record().line
    assert canonical_json({"b": 0.1 + 0.2, "a": [True, None]}) == '{"a":[true,null],"b":0.3}'


def test_the_digest_follows_everything() -> None:
    changes: list[dict[str, Any]] = [{"values": {}}, {"data": "x"}, {"settings": {}}, {"kind": "x"}]
    digests = {record(**change).digest for change in (*changes, {}, {"versions": {}})}
    assert len(digests) == 6


def test_what_a_killed_writer_left_half_is_dropped(tmp_path: Path) -> None:
    add_record(tmp_path, record(0), MACHINE, 1.0)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(record(1).line[:40])
    assert len(read_records(tmp_path)) == 1
    add_record(tmp_path, record(2), MACHINE, 1.0)
    assert [r.key["seed"] for r in read_study(tmp_path).records] == [0, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "No Name"},
        {"key": {"Seed": 0}},
        {"key": {"attack": "a b"}},
        {"key": {"seed": None}},
        {"values": {"x": float("nan")}},
        {"values": {"x": object()}},
        {"values": {1: 2}},
    ],
)
def test_content_that_is_no_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        _ = record(**changes).line


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"records\.jsonl"):
        read_study(tmp_path)
    for text in ("{\n", "[]\n", '{"kind": "x", "extra": 1}\n'):
        (tmp_path / "records.jsonl").write_text(text)
        with pytest.raises(ValueError, match="line 1"):
            read_study(tmp_path)


def test_hardware_names_the_machine() -> None:
    assert hardware("cpu")["device"] == "cpu"
    with pytest.raises(ValueError, match="device"):
        hardware("tpu")


def test_an_id_shows_kind_and_sorted_key() -> None:
    key = {"seed": 0, "fraction": 0.05, "oracle_label": False}
    assert stage_id("mitigation", key) == "mitigation fraction=0.05 oracle_label=false seed=0"
