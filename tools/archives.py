"""Build the six wheels and sdists so that anybody gets the same bytes, and look inside each.

hatchling writes the archives, in the version that constraints.txt pins. Every time stamp in them is
``SOURCE_DATE_EPOCH``: what the environment says, or else the time of the last commit. Each package
is built twice, the second time out of its own sdist in another folder, and the bytes are compared.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import BytesParser
from pathlib import Path

from packaging.requirements import Requirement
from tools.members import ROOT, Package, packages, write
from tools.sbom import bill, pins

# What a wheel may hold: code, its marker, templates, calibrations, and weights with their card.
SUFFIXES = {".py", ".typed", ".html", ".css", ".js", ".json", ".md", ".safetensors", ".toml"}
MOST_BYTES = 10_000_000
SUMS = "SHA256SUMS"
_SOURCE_ROOTS = ("src/", "tests/")
_BESIDE = {"PKG-INFO", ".gitignore", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
_LEFT_OVER = re.compile(r"(^|/)(__pycache__|\.[^/]*_cache|\.hypothesis|\.coverage)(/|$)|\.py[co]$")


def source_files(package: Package) -> dict[str, bytes]:
    """What lies in the folder that is imported: path beside its parent -> bytes."""
    found = {}
    for path in sorted(package.source.rglob("*")):
        name = path.relative_to(package.source.parent).as_posix()
        if path.is_file() and not _LEFT_OVER.search(name):
            found[name] = path.read_bytes()
    return found


def wheel_problems(
    wheel: Path, package: Package, licence: bytes, *, places: Iterable[Path] = ()
) -> list[str]:
    """What is wrong inside one wheel, one line each.

    Args:
        wheel: The archive.
        package: What it should hold: all files of the source folder, byte for byte, and no others.
        licence: The licence that it must carry.
        places: Folders of this machine that no file may name.
    """
    info = f"{package.stem}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    wanted = source_files(package)
    own = {name: data for name, data in files.items() if name.startswith(f"{package.module}/")}
    found = [f"{n} does not belong in a wheel" for n in files if "tests" in n.split("/")]
    found += [f"{n} lies outside {package.module}" for n in files if n not in own and info not in n]
    found += [f"{n} is missing" for n in sorted({*wanted, f"{package.module}/py.typed"} - {*own})]
    found += [f"{n} is not in the source" for n in sorted(own.keys() - wanted.keys())]
    found += [f"{n} is not the source's" for n in wanted if own.get(n, wanted[n]) != wanted[n]]
    found += [f"{n} is of a kind no wheel needs" for n in own if Path(n).suffix not in SUFFIXES]
    if files.get(f"{info}licenses/LICENSE") != licence:
        found.append("LICENSE is missing or not the root's")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"{wheel.stat().st_size} bytes, expected at most {MOST_BYTES}")
    found += _metadata_problems(files.get(f"{info}METADATA", b""), package)
    found += _places_named(files, places)
    return [f"{wheel.name}: {line}" for line in found]


def _metadata_problems(text: bytes, package: Package) -> list[str]:
    """Whether the metadata say what pyproject.toml says, as far as a user would be misled."""
    head = BytesParser().parsebytes(text)
    expected = {"Name": package.name, "Version": str(package.version), "License-Expression": "MIT"}
    found = [
        f"metadata: expected {key}: {value}, got {head[key]}"
        for key, value in expected.items()
        if head[key] != value
    ]
    declared = {Requirement(line).name for line in head.get_all("Requires-Dist", [])}
    siblings = {
        r.name for r in package.siblings({p.name for p in packages(package.home.parents[1])})
    }
    found += [f"metadata: {name} is not required" for name in sorted(siblings - declared)]
    return found


def _places_named(files: Mapping[str, bytes], places: Iterable[Path]) -> list[str]:
    named = [str(place).encode() for place in places]
    return [
        f"{n} names a folder of this machine"
        for n, d in files.items()
        if any(p in d for p in named)
    ]


def sdist_problems(sdist: Path, package: Package, *, places: Iterable[Path] = ()) -> list[str]:
    """What is wrong inside one source distribution, one line each: missing, stray, or telling."""
    top = f"{package.stem}/"
    files, found = {}, []
    with tarfile.open(sdist) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None or not member.name.startswith(top):
                found.append(f"{member.name} is no plain file in {top}")
            else:
                files[member.name.removeprefix(top)] = stream.read()
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    wanted |= {f"src/{name}" for name in source_files(package)}
    wanted |= {f"src/{package.module}/py.typed"}
    found += [f"{name} is missing" for name in sorted(wanted - files.keys())]
    found += [
        f"{name} does not belong in an sdist"
        for name in files
        if (name not in _BESIDE and not name.startswith(_SOURCE_ROOTS)) or _LEFT_OVER.search(name)
    ]
    found += _places_named(files, places)
    return [f"{sdist.name}: {line}" for line in found]


def epoch(root: Path = ROOT) -> int:
    """The second since 1970 that every time stamp in the archives shows.

    Raises:
        ValueError: The environment does not say it, and there is no commit to ask.
    """
    if said := os.environ.get("SOURCE_DATE_EPOCH"):
        if not said.isdigit():
            raise ValueError(f"expected SOURCE_DATE_EPOCH as whole seconds, got {said!r}")
        return int(said)
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise ValueError("no commit to take the time from; set SOURCE_DATE_EPOCH")
    return int(done.stdout)


def build_package(home: Path, out: Path, *, moment: int) -> None:
    """Build the sdist and the wheel of the package in ``home`` into ``out``, by hatchling.

    Raises:
        ValueError: hatchling is not installed, or says no.
    """
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment)}
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out.resolve())]
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"hatchling could not build {home.name}: {last}")


def build_again(sdist: Path, out: Path, *, moment: int) -> None:
    """Build both archives once more, from what an sdist holds."""
    with tempfile.TemporaryDirectory() as elsewhere:
        with tarfile.open(sdist) as archive:
            archive.extractall(elsewhere, filter="data")
        (home,) = Path(elsewhere).iterdir()
        build_package(home, out, moment=moment)


def differences(first: Path, second: Path) -> list[str]:
    """The two archives byte by byte: nothing, or one line saying how they differ."""
    one, other = first.read_bytes(), second.read_bytes()
    if one == other:
        return []
    if first.suffix == ".gz" and gzip.decompress(one) == gzip.decompress(other):
        return [f"{first.name}: built twice, compressed differently"]
    return [f"{first.name}: built twice, {len(one)} and {len(other)} bytes that differ"]


def sums(files: Iterable[Path]) -> str:
    """The lines that ``sha256sum --check`` reads."""
    named = sorted(files, key=lambda path: path.name)
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in named)


def build(out: Path, *, root: Path = ROOT) -> list[Path]:
    """Build all packages into ``out``: wheels, sdists, a bill of materials each, and their hashes.

    Returns:
        The wheels.

    Raises:
        ValueError: A build failed, was not reproducible, or an archive holds what it should not or
            lacks what it should hold. Nothing is said of what is in ``out`` then.
    """
    licence, moment = (root / "LICENSE").read_bytes(), epoch(root)
    members = packages(root)
    versions = pins(root / "constraints.txt") | {p.name: str(p.version) for p in members}
    places = [root.resolve(), out.resolve()]
    out.mkdir(parents=True, exist_ok=True)
    wheels, made, found = [], [], []
    for package in members:
        build_package(package.home, out, moment=moment)
        sdist, wheel = out / f"{package.stem}.tar.gz", out / f"{package.stem}-py3-none-any.whl"
        found += wheel_problems(wheel, package, licence, places=places)
        found += sdist_problems(sdist, package, places=places)
        with tempfile.TemporaryDirectory() as second:
            build_again(sdist, Path(second), moment=moment)
            for path in (sdist, wheel):
                found += differences(path, Path(second, path.name))
        materials = out / f"{package.stem}.cdx.json"
        write(materials, bill(wheel, versions=versions, moment=moment))
        wheels.append(wheel)
        made += [sdist, wheel, materials]
    if found:
        raise ValueError("; ".join(found))
    write(out / SUMS, sums(made))
    return wheels
