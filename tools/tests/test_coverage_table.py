from pathlib import Path

import pytest
from tools import coverage_table
from tools.coverage_table import Row, table
from tools.members import Package

MEMBERS = [Package(Path("one"), "toy-one", "toy_one"), Package(Path("two"), "toy-two", "toy_two")]


def summary(lines: int, covered: int) -> dict[str, dict[str, int]]:
    return {
        "summary": {
            "num_statements": lines,
            "covered_lines": covered,
            "missing_lines": lines - covered,
        }
    }


FILES = {
    "packages/one/src/toy_one/a.py": summary(10, 10),
    "packages/one/src/toy_one/inner/b.py": summary(30, 27),
    "packages\\two\\src\\toy_two\\a.py": summary(10, 8),
    "elsewhere/a.py": summary(1000, 0),
}


def test_packages_are_counted_by_themselves() -> None:
    one, two = table({"files": FILES}, MEMBERS)
    assert one == Row("toy-one", 40, 37, "inner/b.py misses 3") and one.percent == 92.5
    assert (two.name, two.percent) == ("toy-two", 80)


@pytest.mark.parametrize("report", [{}, {"files": []}])
def test_what_is_no_report_is_refused(report: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected a report of coverage"):
        table(report, MEMBERS)


def test_a_package_that_nobody_imported_is_not_fully_covered() -> None:
    with pytest.raises(ValueError, match="names no file of toy-two"):
        table({"files": dict(list(FILES.items())[:2])}, MEMBERS)


@pytest.mark.parametrize(("covered", "status"), [(9, 0), (8, 1)])
def test_the_floor_decides_the_exit_code(
    covered: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real measurement, of ten lines of which some ran."""
    from coverage import CoverageData

    source = tmp_path / "src" / "toy_one" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("".join(f"x{n} = {n}\n" for n in range(10)))
    data = CoverageData(str(tmp_path / "measured"))
    data.add_lines({str(source): range(1, covered + 1)})
    data.write()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coverage_table, "packages", lambda: MEMBERS[:1])
    assert coverage_table.main(["--data", str(tmp_path / "measured")]) == status
    out = capsys.readouterr().out
    assert f"{covered * 10:.1f} % of    10 lines; a.py misses {10 - covered}" in out
    assert ("BELOW 90 %" in out) == bool(status)


def test_nothing_measured_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage_table.main(["--data", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
