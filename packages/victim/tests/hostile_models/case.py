"""What a hostile file is, and the list of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCH = "timm:test_resnet"
Build = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Case:
    """One file: how it is made, how it is opened, and whether it needs a child to be refused."""

    family: str
    build: Build
    child: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}: {self.build.__name__}"


CASES: list[Case] = []


def case(family: str, *, child: bool = False, **settings: Any) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        CASES.append(Case(family, build, child, {"arch": ARCH, **settings}))
        return build

    return add


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
