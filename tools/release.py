"""Build, version, lock and check the six packages.

Run it from the root: `hatch run python tools/release.py COMMAND`.

check                        versions, changelogs, licences and sibling ranges agree
bump PACKAGE minor           new version, new changelog heading, the siblings' ranges follow
build                        dist/: wheels, sdists, bills of materials, hashes; built twice
lock                         requirements.in -> constraints.txt
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.members import ROOT as ROOT
from tools.members import Package as Package
from tools.members import packages as packages
from tools.members import write

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
RELEASED = re.compile(r"(\d+\.\d+\.\d+) - \d{4}-\d{2}-\d{2}")


def sibling_range(version: Version) -> str:
    """The range siblings require: the same minor version before 1.0, the same major after."""
    if version.major == 0:
        return f">=0.{version.minor},<0.{version.minor + 1}"
    return f">={version.major}.{version.minor},<{version.major + 1}"


# --- check ---------------------------------------------------------------------------------------


def changelog_problems(package: Package) -> list[str]:
    """What is wrong with the headings of one changelog, one line each."""
    headings = HEADING.findall(package.changelog.read_text(encoding="utf-8"))
    where = f"{package.name}: CHANGELOG.md"
    if not headings or headings[0] != "Unreleased":
        return [f"{where}: expected '## Unreleased' as the first heading, got {headings[:1]}"]
    problems, versions = [], []
    for heading in headings[1:]:
        match = RELEASED.fullmatch(heading)
        if match is None:
            problems.append(f"{where}: expected '## X.Y.Z - YYYY-MM-DD', got '## {heading}'")
        else:
            versions.append(Version(match[1]))
    if versions != sorted(set(versions), reverse=True):
        problems.append(f"{where}: expected versions from new to old, each once")
    if versions and versions[0] != package.version:
        problems.append(f"{where}: newest is {versions[0]}, the source says {package.version}")
    return problems


def problems(root: Path = ROOT) -> list[str]:
    """Everything that keeps the workspace from being released, one line each."""
    members = {package.name: package for package in packages(root)}
    licence = (root / "LICENSE").read_bytes()
    found = []
    for package in members.values():
        found += changelog_problems(package)
        own = package.home / "LICENSE"
        if not own.is_file() or own.read_bytes() != licence:
            found.append(f"{package.name}: LICENSE is missing or not the root's")
        for requirement in package.siblings(set(members)):
            sibling = members[requirement.name]
            wanted = Requirement(f"x{sibling_range(sibling.version)}").specifier
            if requirement.specifier != wanted:
                found.append(
                    f"{package.name}: expected {sibling.name}{sibling_range(sibling.version)}, "
                    f"got {requirement}"
                )
    return found


# --- bump ----------------------------------------------------------------------------------------


def next_version(version: Version, part: str) -> Version:
    """The version after ``version`` when ``part`` (major, minor or patch) goes up by one."""
    major, minor, patch = version.release
    following = {
        "major": (major + 1, 0, 0),
        "minor": (major, minor + 1, 0),
        "patch": (major, minor, patch + 1),
    }
    if part not in following:
        raise ValueError(f"expected major, minor or patch, got {part!r}")
    return Version(".".join(map(str, following[part])))


def bump(name: str, part: str, *, root: Path = ROOT, today: datetime.date | None = None) -> Version:
    """Write the next version of one package, its changelog heading, and its siblings' ranges.

    A sibling whose range moved gets a line under Unreleased: it has to be released as well.

    Raises:
        ValueError: No such package or part, or nothing stands under Unreleased.
    """
    members = {package.name: package for package in packages(root)}
    members |= {package.home.name: package for package in members.values()}
    if name not in members:
        raise ValueError(f"expected one of {', '.join(sorted(members))}, got {name!r}")
    package = members[name]
    version = next_version(package.version, part)
    history = package.changelog.read_text(encoding="utf-8")
    match = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", history, re.MULTILINE | re.DOTALL)
    if match is None or not match[1].strip():
        raise ValueError(f"nothing stands under '## Unreleased' in the changelog of {package.name}")
    heading = f"## Unreleased\n\n## {version} - {today or datetime.date.today()}\n"
    write(package.changelog, history[: match.start()] + heading + history[match.start(1) :])
    write(package.about, f'__version__ = "{version}"\n')
    for other in packages(root):
        text = other.pyproject.read_text(encoding="utf-8")
        pattern = rf'("{re.escape(package.name)}(?:\[[^\]]*\])?)[<>=~!][^"]*"'
        changed = re.sub(pattern, rf'\g<1>{sibling_range(version)}"', text)
        if changed != text:
            write(other.pyproject, changed)
            history = other.changelog.read_text(encoding="utf-8")
            line = f"- Requires {package.name}{sibling_range(version)}.\n"
            write(other.changelog, add_line(history, line))
    return version


def add_line(history: str, line: str) -> str:
    """A changelog with one more line at the end of what stands under Unreleased."""
    head, mark, rest = history.partition("## Unreleased\n")
    told, following, older = rest.partition("\n## ")
    told = f"{told.strip()}\n" if told.strip() else ""
    return f"{head}{mark}\n{told}{line}{following}{older}"


# --- lock ---------------------------------------------------------------------------------------


def uv(*arguments: str | Path, root: Path = ROOT) -> None:
    """Run uv in ``root``. The constraints of the workspace must not constrain their own making.

    Raises:
        ValueError: uv is missing (hatch brings it) or says no.
    """
    environment = {key: value for key, value in os.environ.items() if key != "UV_CONSTRAINT"}
    try:
        subprocess.run(["uv", *map(str, arguments)], cwd=root, env=environment, check=True)
    except FileNotFoundError:
        raise ValueError("uv is not on the path; run this through `hatch run`") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"uv {arguments[0]} ended with status {error.returncode}") from None


def lock(*, root: Path = ROOT, upgrade: bool = False) -> None:
    """Compile requirements.in into constraints.txt, for every platform and Python we support.

    The six packages are left out: they are installed from here, whatever their version.
    """
    own = [part for package in packages(root) for part in ("--no-emit-package", package.name)]
    options = ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate", *own]
    options += ["--upgrade"] if upgrade else []
    uv("pip", "compile", "-q", "requirements.in", "-o", "constraints.txt", *options, root=root)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="wheels, sdists, bills of materials, hashes")
    building.add_argument("--out", type=Path, default=ROOT / "dist")
    bumping = commands.add_parser("bump", help="next version of one package")
    bumping.add_argument("package", help="a folder under packages/, or a distribution's name")
    bumping.add_argument("part", choices=["major", "minor", "patch"])
    locking = commands.add_parser("lock", help="compile constraints.txt")
    locking.add_argument("--upgrade", action="store_true", help="take newer versions as well")
    commands.add_parser("check", help="versions, changelogs, licences and sibling ranges")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 with a line on stderr when it refuses."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "build":
            # Here, because a bump needs neither hatchling nor the library that writes the bills.
            from tools.archives import build

            for wheel in build(arguments.out):
                print(f"{wheel.name}  {wheel.stat().st_size / 1000:.0f} kB, built twice: the same")
        elif arguments.command == "bump":
            print(bump(arguments.package, arguments.part))
        elif arguments.command == "lock":
            lock(upgrade=arguments.upgrade)
        elif found := problems():
            raise ValueError("; ".join(found))
        else:
            print("versions, changelogs, licences and sibling ranges agree")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
