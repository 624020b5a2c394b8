"""Build, version, lock and check the six packages.

Run it from the root: `hatch run python tools/release.py COMMAND`.

build                        six wheels and sdists into dist/, with their contents checked
bump PACKAGE minor           new version, new changelog heading, the siblings' ranges follow
lock                         requirements.in -> constraints.txt
check                        versions, changelog headings and sibling ranges agree
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
RELEASED = re.compile(r"(\d+\.\d+\.\d+) - \d{4}-\d{2}-\d{2}")


class Package(NamedTuple):
    """One member of the workspace."""

    home: Path  # the folder that holds pyproject.toml
    name: str  # the distribution's name
    module: str  # what one imports

    @property
    def about(self) -> Path:
        """The one file that holds the version."""
        return self.home / "src" / self.module / "__about__.py"

    @property
    def changelog(self) -> Path:
        """The history of this package."""
        return self.home / "CHANGELOG.md"

    @property
    def pyproject(self) -> Path:
        """The package's metadata."""
        return self.home / "pyproject.toml"

    @property
    def version(self) -> Version:
        """The version as written in the source."""
        match = re.search(r'__version__ = "([^"]+)"', self.about.read_text(encoding="utf-8"))
        if match is None:
            raise ValueError(
                f"expected __version__ in {self.about.name} of {self.name}, found none"
            )
        return Version(match[1])

    def siblings(self, names: set[str]) -> list[Requirement]:
        """The requirements that name another member of the workspace."""
        project = tomllib.loads(self.pyproject.read_text(encoding="utf-8"))["project"]
        found = [Requirement(text) for text in project.get("dependencies", [])]
        return [requirement for requirement in found if requirement.name in names]


def packages(root: Path = ROOT) -> list[Package]:
    """Every member of the workspace, sorted by folder."""
    found = []
    for pyproject in sorted((root / "packages").glob("*/pyproject.toml")):
        name = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["name"]
        found.append(Package(pyproject.parent, name, name.replace("-", "_")))
    return found


def sibling_range(version: Version) -> str:
    """The range siblings require: the same minor version before 1.0, the same major after."""
    if version.major == 0:
        return f">=0.{version.minor},<0.{version.minor + 1}"
    return f">={version.major}.{version.minor},<{version.major + 1}"


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


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
    found = []
    for package in members.values():
        found += changelog_problems(package)
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
    return version


# --- lock and build ------------------------------------------------------------------------------


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


def wheel_problems(wheel: Path, package: Package, licence: bytes) -> list[str]:
    """What is wrong inside one wheel, one line each."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"{package.module}-{package.version}.dist-info/"
        found = [f"{wheel.name}: {n} does not belong in a wheel" for n in names if "tests" in n]
        found += [
            f"{wheel.name}: {name} lies outside {package.module}"
            for name in names
            if not name.startswith((f"{package.module}/", info))
        ]
        if f"{package.module}/py.typed" not in names:
            found.append(f"{wheel.name}: py.typed is missing")
        path = f"{info}licenses/LICENSE"
        if path not in names or archive.read(path) != licence:
            found.append(f"{wheel.name}: LICENSE is missing or not the root's")
    return found


def sdist_problems(sdist: Path, package: Package) -> list[str]:
    """What is missing from one source distribution, one line each."""
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    top = f"{package.module}-{package.version}"
    wanted = ["pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"]
    wanted += [f"src/{package.module}/py.typed"]
    return [f"{sdist.name}: {n} is missing" for n in wanted if f"{top}/{n}" not in names]


def build(out: Path, *, root: Path = ROOT) -> list[Path]:
    """Build a wheel and an sdist of each package into ``out``, and look inside each.

    Returns:
        The six wheels.

    Raises:
        ValueError: A build failed, or a file is missing from an archive or should not be there.
    """
    licence = (root / "LICENSE").read_bytes()
    wheels, found = [], []
    for package in packages(root):
        uv("build", "-q", package.home, "--out-dir", out, root=root)
        stem = f"{package.module}-{package.version}"
        wheels.append(out / f"{stem}-py3-none-any.whl")
        found += wheel_problems(wheels[-1], package, licence)
        found += sdist_problems(out / f"{stem}.tar.gz", package)
    if found:
        raise ValueError("; ".join(found))
    return wheels


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="wheels and sdists into dist/, contents checked")
    building.add_argument("--out", type=Path, default=ROOT / "dist")
    bumping = commands.add_parser("bump", help="next version of one package")
    bumping.add_argument("package", help="a folder under packages/, or a distribution's name")
    bumping.add_argument("part", choices=["major", "minor", "patch"])
    locking = commands.add_parser("lock", help="compile constraints.txt")
    locking.add_argument("--upgrade", action="store_true", help="take newer versions as well")
    commands.add_parser("check", help="versions, changelogs and sibling ranges")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 with a line on stderr when it refuses."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "build":
            for wheel in build(arguments.out):
                print(wheel.name)
        elif arguments.command == "bump":
            print(bump(arguments.package, arguments.part))
        elif arguments.command == "lock":
            lock(upgrade=arguments.upgrade)
        elif found := problems():
            raise ValueError("; ".join(found))
        else:
            print("versions, changelogs and sibling ranges agree")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
