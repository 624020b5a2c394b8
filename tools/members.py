"""The six packages of the workspace, as the tools see them: where each lies, and its version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


class Package(NamedTuple):
    """One member of the workspace."""

    home: Path  # the folder that holds pyproject.toml
    name: str  # the distribution's name
    module: str  # what one imports

    @property
    def source(self) -> Path:
        """The folder that is imported."""
        return self.home / "src" / self.module

    @property
    def about(self) -> Path:
        """The one file that holds the version."""
        return self.source / "__about__.py"

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

    @property
    def stem(self) -> str:
        """How the names of its archives begin, and what an sdist's folder is called."""
        return f"{self.module}-{self.version}"

    def siblings(self, names: set[str]) -> list[Requirement]:
        """The requirements, those of extras too, that name another member of the workspace."""
        project = tomllib.loads(self.pyproject.read_text(encoding="utf-8"))["project"]
        texts = list(project.get("dependencies", []))
        for extra in project.get("optional-dependencies", {}).values():
            texts += extra
        found = [Requirement(text) for text in texts]
        return [requirement for requirement in found if requirement.name in names]


def packages(root: Path = ROOT) -> list[Package]:
    """Every member of the workspace, sorted by folder."""
    found = []
    for pyproject in sorted((root / "packages").glob("*/pyproject.toml")):
        name = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["name"]
        found.append(Package(pyproject.parent, name, name.replace("-", "_")))
    return found


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
