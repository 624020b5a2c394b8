"""The section of a results page about the speed of networks, from what the benchmarks recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wm_eval.tables import Table, number, to_markdown

RECORD = "speed-bench.json"
_NAME = re.compile(r".*::test_(?P<test>\w+)(\[(?P<case>.*)\])?")


def speed_parts(folder: Path) -> list[str]:
    """The section, in Markdown; nothing where there is no record.

    Args:
        folder: Where ``speed-bench.json`` lies, as ``hatch run bench --record`` writes it.
    """
    path = folder / RECORD
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        "## Speed of the networks",
        "",
        f"`hatch run bench --record results/{folder.name}/{RECORD}` makes it; "
        f"[record]({folder.name}/{RECORD}). [What is measured](../docs/speed.md). One thread of: "
        f"{record['processor']}; {versions}.",
        "",
        to_markdown(_shares(record["benchmarks"])),
        "",
        to_markdown(_service(record["benchmarks"])),
        "",
    ]


def _shares(benchmarks: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, row in benchmarks.items():
        if "fraction_of_matmul" in row:
            rows.append(
                (
                    _short(name),
                    f"{row['images_per_second']:.0f}",
                    number(row["fraction_of_matmul"]),
                    number(row["fraction_spread"], digits=3),
                    number(row["fraction_of_torch_mm"]),
                    row["matmul"],
                )
            )
    headers = (
        "network",
        "images/s",
        "share of the best matrix product",
        "spread",
        "share of the best by torch.mm",
        "best product",
    )
    note = (
        "32 pixels; the numbers in a name are the batch or the width. Seconds of the processor; "
        "medians over rounds that take network and products in turns. int8 is held against "
        "float32 products."
    )
    return Table("speed-shares", "Share of the matrix rate", headers, tuple(rows), note)


def _service(benchmarks: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            name.split("[")[1].split("-")[0],
            str(row["images_a_second_alone"]),
            str(row["images_a_second_served"]),
            number(row["served_times_alone"]),
            number(row["goal"]),
        )
        for name, row in benchmarks.items()
        if "served_times_alone" in row
    ]
    headers = ("images a request", "images/s in one process", "images/s served", "share", "goal")
    note = (
        "The tiny injector behind `wm-inject serve`: binary tensors, eight clients on the same "
        "machine, against the model alone in batches of 32 on one thread; in turns."
    )
    return Table("speed-service", "The service", headers, tuple(rows), note)


def _short(name: str) -> str:
    found = _NAME.fullmatch(name)
    if found is None:
        return name
    words = found["test"].replace("_", " ")
    return f"{words}, {found['case']}" if found["case"] else words


__all__ = ["RECORD", "speed_parts"]
