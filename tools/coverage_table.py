"""How much of each package the last `coverage run` went through; exit 1 below the floor.

    hatch run cov        # the tests under coverage, then this table

Counted are lines, of the six packages by themselves: a well-tested one must not pay for another.
What a child process runs (the sandbox, a served process) is not seen, and so counts as missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.members import Package, packages

FLOOR = 90.0  # per cent of the lines


class Row(NamedTuple):
    """One package's lines."""

    name: str
    lines: int
    covered: int
    worst: str  # the file that misses the most lines, and how many

    @property
    def percent(self) -> float:
        """Covered lines in per cent; a package without a line has none to miss."""
        return 100 * self.covered / self.lines if self.lines else 100.0


def table(report: Mapping[str, Any], members: Sequence[Package]) -> list[Row]:
    """The rows of a report that ``coverage json`` wrote.

    Raises:
        ValueError: Not such a report, or it has not a single file of one of the packages.
    """
    files = report.get("files")
    if not isinstance(files, Mapping):
        raise ValueError("expected a report of coverage, got no files in it")
    rows = []
    for package in members:
        mark = f"/src/{package.module}/"
        places = {"/" + path.replace("\\", "/"): one["summary"] for path, one in files.items()}
        sums = {place.partition(mark)[2]: one for place, one in places.items() if mark in place}
        if not sums:
            raise ValueError(f"the report names no file of {package.name}")
        name, worst = max(sums.items(), key=lambda item: item[1]["missing_lines"])
        rows.append(
            Row(
                package.name,
                sum(one["num_statements"] for one in sums.values()),
                sum(one["covered_lines"] for one in sums.values()),
                f"{name} misses {worst['missing_lines']}",
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a package lies below the floor, or there is nothing to read."""
    parser = argparse.ArgumentParser(
        prog="coverage_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default=".coverage", help="what `coverage run` wrote")
    arguments = parser.parse_args(argv)
    from coverage import Coverage
    from coverage.exceptions import CoverageException

    try:
        whole = Coverage(data_file=arguments.data)
        whole.load()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "coverage.json")
            whole.json_report(outfile=str(path))
            rows = table(json.loads(path.read_text(encoding="utf-8")), packages())
    except (ValueError, CoverageException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        verdict = "" if row.percent >= FLOOR else f"  BELOW {FLOOR:.0f} %"
        print(f"{row.name:16} {row.percent:5.1f} % of {row.lines:5} lines; {row.worst}{verdict}")
    return int(any(row.percent < FLOOR for row in rows))


if __name__ == "__main__":
    sys.exit(main())
