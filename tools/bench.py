"""Run the benchmarks and compare each network's share of the matrix rate with the baseline.

    python tools/bench.py                      # exit 1 if one fell by more than 15 %
    python tools/bench.py --update             # write the baseline from this run
    python tools/bench.py --record FILE        # write what was measured, as JSON
    python tools/bench.py -k injector          # only some: what is not its own goes to pytest

A benchmark that fell is run once more, and counts only if it fell again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from wm_inject.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "tools" / "bench_baseline.json"
FORMAT, RECORD_FORMAT = "wm-bench-2", "wm-bench-1"  # of the baseline, of a record
TOLERANCE = 0.15
FIGURE = "fraction_of_matmul"
# Processors that multiply with other units have other shares: each kind has a baseline of its own.
UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


class Row(NamedTuple):
    """One benchmark beside its baseline; None where it has no figure."""

    name: str
    before: float | None
    now: float | None

    @property
    def change(self) -> float:
        """Relative change, 0 where one side is missing."""
        return self.now / self.before - 1 if self.before and self.now else 0.0

    def fell(self, tolerance: float = TOLERANCE) -> bool:
        """Whether it lost more than the tolerance."""
        return self.change < -tolerance


def fractions(report: Mapping[str, Any]) -> dict[str, float]:
    """The shares in a report of pytest-benchmark, by full name; ratios have none.

    Raises:
        ValueError: Not such a report, or a share that is no positive number.
    """
    rows = report.get("benchmarks") if isinstance(report, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError("expected a report of pytest-benchmark, got no list of benchmarks")
    found = {row["fullname"]: row.get("extra_info", {}).get(FIGURE) for row in rows}
    return _positive({name: value for name, value in found.items() if value is not None})


def matrix_unit(report: Mapping[str, Any]) -> str:
    """The best of `UNITS` that the processor of a report has, "other" if none."""
    flags = report.get("machine_info", {}).get("cpu", {}).get("flags", ())
    return next((unit for unit in UNITS if unit in flags), "other")


def load_baseline(path: Path) -> dict[str, dict[str, float]]:
    """The shares that a baseline file holds, by `matrix_unit`.

    Raises:
        ValueError: No such file, no JSON, another format, or a share that is no positive number.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"expected a baseline, found no {path.name}: write it with --update"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {path.name}, got {error}") from error
    kind = value.get("format") if isinstance(value, dict) else type(value).__name__
    if kind != FORMAT or not isinstance(value.get("fractions"), dict):
        raise ValueError(f"expected a baseline of format {FORMAT} in {path.name}, got {kind}")
    return {unit: _positive(shares) for unit, shares in value["fractions"].items()}


def _positive(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise ValueError(f"expected shares by benchmark, got {values!r}")
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected a share > 0 for {name}, got {value!r}")
    return {name: float(value) for name, value in values.items()}


def compare(found: Mapping[str, float], baseline: Mapping[str, float]) -> list[Row]:
    """Every benchmark of either side, the largest loss first."""
    rows = [Row(n, baseline.get(n), found.get(n)) for n in sorted({*found, *baseline})]
    return sorted(rows, key=lambda row: row.change)


def table(rows: Iterable[Row]) -> str:
    """The rows as lines for a terminal."""
    lines = [f"{'before':>8} {'now':>8} {'change':>8}  benchmark"]
    for row in rows:
        before, now = (f"{v:8.3f}" if v else f"{'–':>8}" for v in (row.before, row.now))
        change = f"{row.change:+8.1%}" if row.before and row.now else f"{'–':>8}"
        lines.append(f"{before} {now} {change}  {row.name.rpartition('/')[2]}")
    return "\n".join(lines)


def record(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, by full name, and with what; nothing that names a machine's owner."""
    rows = {}
    for row in report["benchmarks"]:
        stats = {"seconds": row["stats"]["median"], "rounds": row["stats"]["rounds"]}
        rows[row["fullname"]] = {**row["extra_info"], **stats, "group": row["group"]}
    versions = {name: metadata.version(name) for name in ("torch", "timm", "numpy")}
    cpu = report.get("machine_info", {}).get("cpu", {})
    return {
        "format": RECORD_FORMAT,
        "processor": cpu.get("brand_raw", platform.machine()),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "python": platform.python_version(),
        "versions": {**versions, "onnxruntime": _onnxruntime()},
        "benchmarks": rows,
    }


def merged(path: Path | None, new: dict[str, Any]) -> dict[str, Any]:
    """A record of some benchmarks with the others of the file, if those are of the same machine.

    Raises:
        ValueError: The file's record is of another processor, other versions or another format.
    """
    if path is None or not path.exists():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    rows = {**old.pop("benchmarks", {}), **new["benchmarks"]}
    if old != {name: value for name, value in new.items() if name != "benchmarks"}:
        raise ValueError(f"expected {path.name} of this machine and these versions, got another")
    return {**new, "benchmarks": rows}


def _onnxruntime() -> str | None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the benchmarks in a process of their own, and give pytest-benchmark's report.

    Raises:
        RuntimeError: A benchmark failed, or none was chosen.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "--benchmark-only", "-m", "bench and not slow"]
        command += [f"--benchmark-json={path}", "--benchmark-columns=median,iqr,rounds"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode
        if code or not path.exists():
            raise RuntimeError(f"expected benchmarks that pass, pytest ended with {code}")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, write what was asked for. Exit code 1: something fell; 2: it could not run."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other arguments go to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument("--update", action="store_true", help="write the baseline from this run")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    args, chosen = parser.parse_known_args(arguments)
    chosen = [one for one in chosen if one != "--"]
    try:
        baseline = {} if args.update else load_baseline(args.baseline)
        report = run(chosen or ["packages"])
        found, unit = fractions(report), matrix_unit(report)
        if args.record:
            write_json(args.record, merged(args.record if chosen else None, record(report)))
        if args.update:
            every = load_baseline(args.baseline) if args.baseline.exists() else {}
            every[unit] = {**(every.get(unit, {}) if chosen else {}), **found}
            write_json(args.baseline, {"format": FORMAT, "fractions": every})
            print(f"{len(found)} shares with {unit} written to {args.baseline.name}")
            return 0
        before = baseline.get(unit, {})
        if not before:
            print(f"no baseline for processors with {unit}: nothing is compared; see --update")
        again = [row.name for row in compare(found, before) if row.fell()]
        if again:
            print(f"{len(again)} fell: once more, to see whether it was the machine")
            second = fractions(run(again))
            found.update({n: max(found[n], second.get(n, 0.0)) for n in again})
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return verdict(compare(found, before))


def verdict(rows: Sequence[Row]) -> int:
    """Print the comparison and say whether it passes: 0, or 1 if something fell."""
    print(table(row for row in rows if row.now))
    for kind, names in (
        ("new, not in the baseline", [row.name for row in rows if row.before is None]),
        ("in the baseline, not run", [row.name for row in rows if row.now is None]),
    ):
        if names:
            print(f"{len(names)} {kind}")
    lost = [row for row in rows if row.fell()]
    if lost:
        print(f"\n{len(lost)} fell by more than {TOLERANCE:.0%}:\n{table(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
