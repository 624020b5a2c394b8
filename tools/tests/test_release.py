import datetime
from pathlib import Path

import pytest
from packaging.version import Version
from tools import release

DAY = datetime.date(2031, 5, 4)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The six packages without their code: pyproject, changelog and version, all at 0.1.0."""
    for package in release.packages():
        source = tmp_path / "packages" / package.home.name / "src" / package.module
        source.mkdir(parents=True)
        (source / "__about__.py").write_text('__version__ = "0.1.0"\n')
        (source.parents[1] / "CHANGELOG.md").write_text("# history\n\n## Unreleased\n\n- New.\n")
        (source.parents[1] / "LICENSE").write_text("Do as you like.\n")
        text = package.pyproject.read_text()
        text = text.replace(release.sibling_range(package.version), ">=0.1,<0.2")
        (source.parents[1] / "pyproject.toml").write_text(text)
    (tmp_path / "LICENSE").write_text("Do as you like.\n")
    return tmp_path


def member(root: Path, name: str) -> release.Package:
    (found,) = [package for package in release.packages(root) if package.name == name]
    return found


def test_the_workspace_could_be_released() -> None:
    assert release.problems() == []


def test_next_version(subtests: pytest.Subtests) -> None:
    for part, expected in [("major", "2.0.0"), ("minor", "1.3.0"), ("patch", "1.2.4")]:
        with subtests.test(part=part, expected=expected):
            assert release.next_version(Version("1.2.3"), part) == Version(expected)


def test_next_version_refuses_another_part() -> None:
    with pytest.raises(ValueError, match="expected major, minor or patch, got 'mini'"):
        release.next_version(Version("1.2.3"), "mini")


@pytest.mark.parametrize(("version", "expected"), [("0.1.7", ">=0.1,<0.2"), ("1.2.3", ">=1.2,<2")])
def test_sibling_range(version: str, expected: str) -> None:
    assert release.sibling_range(Version(version)) == expected


def test_bump_writes_version_heading_and_ranges(house: Path) -> None:
    assert release.bump("wm-inject", "minor", root=house, today=DAY) == Version("0.2.0")
    package = member(house, "wm-inject")
    assert package.version == Version("0.2.0")
    expected = "# history\n\n## Unreleased\n\n## 0.2.0 - 2031-05-04\n\n- New.\n"
    assert package.changelog.read_text() == expected
    assert '"wm-inject[torch]>=0.2,<0.3"' in member(house, "wm-eval").pyproject.read_text()
    assert '"wm-extract>=0.1,<0.2"' in member(house, "wm-eval").pyproject.read_text()


def test_a_sibling_whose_range_moved_says_so_and_can_be_released_in_turn(house: Path) -> None:
    release.bump("wm-eval", "patch", root=house, today=DAY)
    release.bump("wm-inject", "minor", root=house, today=DAY)
    history = member(house, "wm-eval").changelog.read_text()
    line = "- Requires wm-inject>=0.2,<0.3.\n"
    assert f"## Unreleased\n\n{line}\n## 0.1.1 - 2031-05-04\n" in history
    assert member(house, "wm-extract").changelog.read_text().endswith(f"- New.\n{line}")
    assert release.bump("wm-eval", "patch", root=house, today=DAY) == Version("0.1.2")
    for name in ("wm-extract", "wm-victim", "defense-nc", "defense-reverse"):
        release.bump(name, "minor", root=house, today=DAY)
    assert release.problems(house) == []  # the headings and ranges that a bump writes are right


def test_bump_takes_the_folder_too_and_a_patch_leaves_the_ranges(house: Path) -> None:
    before = member(house, "defense-nc").pyproject.read_text()
    assert release.bump("victim", "patch", root=house, today=DAY) == Version("0.1.1")
    assert member(house, "defense-nc").pyproject.read_text() == before


def test_bump_refuses_an_unknown_package(house: Path) -> None:
    with pytest.raises(ValueError, match="got 'nothing'"):
        release.bump("nothing", "patch", root=house)


def test_bump_refuses_when_there_is_nothing_to_tell(house: Path) -> None:
    release.bump("wm-eval", "patch", root=house, today=DAY)
    with pytest.raises(ValueError, match="nothing stands under '## Unreleased'"):
        release.bump("wm-eval", "patch", root=house, today=DAY)
    assert member(house, "wm-eval").version == Version("0.1.1")


def test_check_names_a_bad_changelog(house: Path, subtests: pytest.Subtests) -> None:
    for text, message in [
        ("# history\n\n## 0.1.0 - 2031-05-04\n", "expected '## Unreleased' as the first heading"),
        ("## Unreleased\n\n## 0.1.0\n", "expected '## X.Y.Z - YYYY-MM-DD', got '## 0.1.0'"),
        ("## Unreleased\n\n## 0.3.0 - 2031-05-04\n", "newest is 0.3.0, the source says 0.1.0"),
        (
            "## Unreleased\n\n## 0.1.0 - 2031-05-04\n\n## 0.2.0 - 2031-05-04\n",
            "expected versions from new to old",
        ),
    ]:
        with subtests.test(text=text, message=message):
            member(house, "wm-extract").changelog.write_text(text)
            (found,) = release.problems(house)
            assert found.startswith("wm-extract: CHANGELOG.md")
            assert message in found


def test_check_names_a_sibling_range_that_lags(house: Path) -> None:
    member(house, "defense-nc").about.write_text('__version__ = "0.2.0"\n')
    found = [line for line in release.problems(house) if "expected defense-nc>=0.2,<0.3" in line]
    assert len(found) == 2  # defense-reverse and wm-eval


def test_check_names_a_range_in_an_extra(house: Path) -> None:
    pyproject = member(house, "wm-inject").pyproject
    text = pyproject.read_text()
    pyproject.write_text(text.replace("lpips = [", 'lpips = [\n  "wm-extract>=0.3",'))
    assert release.problems(house) == [
        "wm-inject: expected wm-extract>=0.1,<0.2, got wm-extract>=0.3"
    ]


def test_check_names_a_licence_that_is_not_the_roots(house: Path) -> None:
    (member(house, "wm-extract").home / "LICENSE").unlink()
    (member(house, "wm-victim").home / "LICENSE").write_text("Ask first.\n")
    assert sorted(release.problems(house)) == [
        "wm-extract: LICENSE is missing or not the root's",
        "wm-victim: LICENSE is missing or not the root's",
    ]


def test_a_refusal_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["bump", "nothing", "patch"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected one of") and error.count("\n") == 1
