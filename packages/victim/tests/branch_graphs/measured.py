"""The sets of graphs looked at, one record a graph, and the table of them.

    python packages/victim/tests/measure_branches.py FOLDER RECORD.json

FOLDER keeps the ONNX files; graphs that the record has already are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wm_victim.branches.find import find_branches

from . import harmless, harmless_again, planted, planted_again, planted_last

OPTIONS = dict.fromkeys(("image_size", "channels", "num_classes", "mean", "std"))
Write = Callable[[Path], Path]


def graphs() -> Iterator[tuple[str, str, str, Write]]:
    """Set, kind, name, and what writes the file into a folder."""
    for name in planted.KINDS:
        yield "first", "planted", name, lambda folder, name=name: planted.write(name, folder)
    for name in planted_again.names():
        yield "second", "planted", name, lambda folder, name=name: planted_again.write(name, folder)
    for name in planted_last.KINDS:
        yield "third", "planted", name, lambda folder, name=name: planted_last.write(name, folder)
    for number, module in (("first", harmless), ("second", harmless_again)):
        for name, write in module.cases().items():
            yield number, "harmless", name, write


def look(path: Path, folder: Path) -> dict[str, Any]:
    """What a look finds, without the pictures, and its seconds."""
    start = time.process_time()
    found = find_branches(path, folder, {**OPTIONS, "images": False})
    seconds = round(time.process_time() - start, 1)
    kept = ("state", "stamp", "share", "effect", "decides", "joins", "layers", "clean_taken", "why")
    branches = [
        {name: branch[name] for name in kept if name in branch} for branch in found["branches"]
    ]
    facts = {name: found[name] for name in ("layers", "nodes", "image_size")}
    return {"seconds": seconds, **facts, "branches": branches}


def measure(folder: Path, record: Path) -> list[dict[str, Any]]:
    """Look at every graph that the record does not have, and write it after each."""
    rows = json.loads(record.read_text()) if record.exists() else []
    known = {(row["set"], row["kind"], row["name"]) for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    for number, kind, name, write in graphs():
        if (number, kind, name) in known:
            continue
        prefix = {"second": "again_", "third": "last_"}.get(number, "")
        path = folder / f"{prefix if kind == 'planted' else ''}{name}.onnx"
        row = {"set": number, "kind": kind, "name": name}
        rows.append(row | look(path if path.exists() else write(folder), folder))
        record.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def verdict(row: dict[str, Any]) -> str:
    """ "backdoored", "inconclusive" or "nothing found"."""
    states = {branch["state"] for branch in row["branches"]}
    if "steers" in states:
        return "backdoored"
    return "inconclusive" if states & {"fired", "not fired"} else "nothing found"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """By set and kind: how many graphs got each verdict, as Markdown."""
    lines = ["| set | graphs | backdoored | inconclusive | nothing found | median, longest s |"]
    lines.append("|---|---|---|---|---|---|")
    for number in ("first", "second", "third"):
        for kind in ("planted", "harmless"):
            some = [row for row in rows if (row["set"], row["kind"]) == (number, kind)]
            if not some:
                continue
            counts = [
                sum(verdict(row) == one for row in some)
                for one in ("backdoored", "inconclusive", "nothing found")
            ]
            seconds = sorted(row["seconds"] for row in some) or [0.0]
            times = f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}"
            cells = [number, f"{len(some)} {kind}", *map(str, counts), times]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
