"""Both sets of graphs: the planted ones are named, no harmless one is accused. Minutes."""

from pathlib import Path

import pytest

from .branch_graphs.measured import measure, table, verdict


@pytest.mark.slow
def test_both_sets(tmp_path: Path) -> None:
    rows = measure(tmp_path / "graphs", tmp_path / "record.json")
    told = "\n".join(table(rows))
    planted = [row for row in rows if row["kind"] == "planted"]
    harmless = [row for row in rows if row["kind"] == "harmless"]
    assert sum(verdict(row) == "backdoored" for row in planted) >= len(planted) - 2, told
    assert all(row["branches"] for row in planted), told
    assert len(harmless) >= 120
    assert [row["name"] for row in harmless if verdict(row) == "backdoored"] == [], told
