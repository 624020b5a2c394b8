"""What may leave the house: archives looked into, built to the same bytes, and their bills."""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tools import archives, members, sbom

LICENCE = b"Do as you like.\n"
METADATA = """Metadata-Version: 2.4
Name: toy-box
Version: 0.3.0
License-Expression: MIT
Requires-Dist: numpy>=1.26
Requires-Dist: toy-base<0.2,>=0.1
Requires-Dist: pytest; extra == 'more'
Provides-Extra: more

# toy-box
"""
PYPROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{name}"
dynamic = ["version"]
requires-python = ">=3.11"
readme = "README.md"
license = "MIT"
license-files = ["LICENSE"]
dependencies = {needs}

[tool.hatch.version]
path = "src/{module}/__about__.py"

[tool.hatch.build.targets.wheel]
packages = ["src/{module}"]

[tool.hatch.build.targets.sdist]
include = ["src", "tests", "README.md", "CHANGELOG.md", "LICENSE"]
"""


def add_package(root: Path, name: str, version: str, needs: list[str]) -> members.Package:
    package = members.Package(root / "packages" / name, name, name.replace("-", "_"))
    files = {
        "pyproject.toml": PYPROJECT.format(name=name, module=package.module, needs=needs),
        "README.md": f"# {name}\n",
        "CHANGELOG.md": "## Unreleased\n",
        "LICENSE": LICENCE.decode(),
        "tests/test_toy.py": "",
        f"src/{package.module}/__init__.py": "",
        f"src/{package.module}/__about__.py": f'__version__ = "{version}"\n',
        f"src/{package.module}/py.typed": "",
        f"src/{package.module}/weights/toy.safetensors": "sixteen numbers",
    }
    for place, text in files.items():
        path = package.home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A workspace of two packages, one of which needs the other."""
    add_package(tmp_path, "toy-base", "0.1.4", [])
    add_package(tmp_path, "toy-box", "0.3.0", ["numpy>=1.26", "toy-base>=0.1,<0.2"])
    (tmp_path / "LICENSE").write_bytes(LICENCE)
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    return tmp_path


@pytest.fixture
def box(house: Path) -> members.Package:
    return members.packages(house)[1]


def good_wheel(package: members.Package) -> dict[str, bytes]:
    info = f"{package.stem}.dist-info"
    return {
        **archives.source_files(package),
        f"{info}/METADATA": METADATA.encode(),
        f"{info}/licenses/LICENSE": LICENCE,
    }


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def good_sdist(package: members.Package) -> dict[str, bytes]:
    inner = [path for path in sorted(package.home.rglob("*")) if path.is_file()]
    return {path.relative_to(package.home).as_posix(): path.read_bytes() for path in inner}


def tarred(path: Path, top: str, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_wheel_as_it_should_be(box: members.Package, tmp_path: Path) -> None:
    (box.source / "__pycache__").mkdir()
    (box.source / "__pycache__" / "toy.pyc").write_bytes(b"left by an import, and not packed")
    wheel = zipped(tmp_path / "good.whl", good_wheel(box))
    assert archives.wheel_problems(wheel, box, LICENCE, places=[tmp_path]) == []


Change = Callable[[dict[str, bytes]], object]
INFO = "toy_box-0.3.0.dist-info"


def test_what_is_wrong_inside_a_wheel_is_named(
    box: members.Package, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for change, expected in [
        (lambda f: f.update({"toy_box/tests/test_x.py": b""}), "does not belong in a wheel"),
        (lambda f: f.update({"other/__init__.py": b""}), "other/__init__.py lies outside toy_box"),
        (lambda f: f.pop("toy_box/py.typed"), "toy_box/py.typed is missing"),
        (lambda f: f.pop("toy_box/weights/toy.safetensors"), "toy.safetensors is missing"),
        (
            lambda f: f.update({"toy_box/weights/toy.safetensors": b"seventeen"}),
            "toy.safetensors is not the source's",
        ),
        (lambda f: f.update({"toy_box/extra.py": b""}), "toy_box/extra.py is not in the source"),
        (lambda f: f.update({"toy_box/cat.png": b""}), "cat.png is of a kind no wheel needs"),
        (lambda f: f.pop(f"{INFO}/licenses/LICENSE"), "LICENSE is missing or not the root's"),
        (
            lambda f: f.update({f"{INFO}/licenses/LICENSE": b"Ask."}),
            "LICENSE is missing or not the root's",
        ),
        (
            lambda f: f.update({f"{INFO}/METADATA": METADATA.replace("0.3.0", "0.2.9").encode()}),
            "metadata: expected Version: 0.3.0, got 0.2.9",
        ),
        (
            lambda f: f.update({f"{INFO}/METADATA": METADATA.replace("toy-base", "x").encode()}),
            "metadata: toy-base is not required",
        ),
    ]:
        with subtests.test(change=change, expected=expected):
            files = good_wheel(box)
            change(files)
            found = archives.wheel_problems(zipped(tmp_path / "bad.whl", files), box, LICENCE)
            assert found and all(line.startswith("bad.whl: ") for line in found)
            assert any(expected in line for line in found), found


def test_a_wheel_that_names_a_folder_of_the_machine(box: members.Package, tmp_path: Path) -> None:
    (box.source / "settings.json").write_text(json.dumps({"data": str(tmp_path / "data")}))
    wheel = zipped(tmp_path / "bad.whl", good_wheel(box))
    assert archives.wheel_problems(wheel, box, LICENCE, places=[tmp_path]) == [
        "bad.whl: toy_box/settings.json names a folder of this machine"
    ]


def test_a_wheel_that_is_too_large(
    box: members.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = zipped(tmp_path / "big.whl", good_wheel(box))
    monkeypatch.setattr(archives, "MOST_BYTES", wheel.stat().st_size)
    assert archives.wheel_problems(wheel, box, LICENCE) == []
    monkeypatch.setattr(archives, "MOST_BYTES", wheel.stat().st_size - 1)
    (found,) = archives.wheel_problems(wheel, box, LICENCE)
    assert "expected at most" in found


def test_an_sdist_as_it_should_be(box: members.Package, tmp_path: Path) -> None:
    sdist = tarred(tmp_path / "good.tar.gz", box.stem, good_sdist(box))
    assert archives.sdist_problems(sdist, box) == []


def test_what_is_wrong_inside_an_sdist_is_named(
    box: members.Package, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for change, expected in [
        (lambda f: f.pop("LICENSE"), "LICENSE is missing"),
        (lambda f: f.pop("src/toy_box/py.typed"), "src/toy_box/py.typed is missing"),
        (lambda f: f.pop("src/toy_box/weights/toy.safetensors"), "toy.safetensors is missing"),
        (lambda f: f.update({"runs/victim.pt": b""}), "runs/victim.pt does not belong"),
        (lambda f: f.update({"tests/__pycache__/a.pyc": b""}), "a.pyc does not belong"),
        (lambda f: f.update({"tests/.hypothesis/x": b""}), ".hypothesis/x does not belong"),
        (lambda f: f.update({"../outside": b""}), "does not belong"),
    ]:
        with subtests.test(change=change, expected=expected):
            files = good_sdist(box)
            change(files)
            found = archives.sdist_problems(tarred(tmp_path / "bad.tar.gz", box.stem, files), box)
            assert any(expected in line for line in found), found


def test_an_sdist_with_another_top_or_a_link(box: members.Package, tmp_path: Path) -> None:
    sdist = tarred(tmp_path / "bad.tar.gz", "elsewhere", {"LICENSE": LICENCE})
    (first, *_) = archives.sdist_problems(sdist, box)
    assert first == "bad.tar.gz: elsewhere/LICENSE is no plain file in toy_box-0.3.0/"


def test_the_time_of_the_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert archives.epoch() == 1700000000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ValueError, match="expected SOURCE_DATE_EPOCH as whole seconds"):
        archives.epoch()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="no commit to take the time from"):
        archives.epoch(tmp_path)


def test_the_time_of_the_last_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    when = {"GIT_COMMITTER_DATE": "1234567890 +0000", "GIT_AUTHOR_DATE": "1000000000 +0000"}
    environment = {key: os.environ[key] for key in ("PATH",)} | when
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, env=environment, check=True)
    assert archives.epoch(tmp_path) == 1234567890


def test_builds_that_differ_are_told(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("a.whl", "b.whl", "c.whl"))
    one.write_bytes(b"abc")
    same.write_bytes(b"abc")
    other.write_bytes(b"abcd")
    assert archives.differences(one, same) == []
    assert archives.differences(one, other) == ["a.whl: built twice, 3 and 4 bytes that differ"]


def test_the_hashes_are_those_that_sha256sum_reads(tmp_path: Path) -> None:
    (tmp_path / "b.whl").write_bytes(b"")
    (tmp_path / "a.whl").write_bytes(b"abc")
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    lines = archives.sums([tmp_path / "b.whl", tmp_path / "a.whl"])
    assert lines == f"{abc}  a.whl\n{nothing}  b.whl\n"


def test_a_bill_names_the_wheel_its_weights_and_what_it_brings(
    box: members.Package, tmp_path: Path
) -> None:
    wheel = zipped(tmp_path / "toy_box-0.3.0-py3-none-any.whl", good_wheel(box))
    versions = {"numpy": "2.4.6", "toy-base": "0.1.4", "pytest": "9.0.0", "iniconfig": "2.3.1"}
    text = sbom.bill(wheel, versions=versions, moment=1700000000)
    told = json.loads(text)
    assert (told["bomFormat"], told["specVersion"]) == ("CycloneDX", "1.6")
    assert told["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    main = told["metadata"]["component"]
    assert (main["name"], main["version"]) == ("toy-box", "0.3.0")
    digest = archives.sums([wheel]).split()[0]
    assert main["hashes"] == [{"alg": "SHA-256", "content": digest}]
    (weights,) = main["components"]
    assert weights["type"] == "machine-learning-model"
    assert weights["name"] == "toy_box/weights/toy.safetensors"
    parts = {part["name"]: part for part in told["components"]}
    assert parts["numpy"]["purl"] == "pkg:pypi/numpy@2.4.6"
    assert parts["numpy"]["scope"] == parts["toy-base"]["scope"] == "required"
    # An extra brings pytest, and pytest brings iniconfig.
    assert parts["pytest"]["scope"] == parts["iniconfig"]["scope"] == "optional"
    needs = {line["ref"]: line.get("dependsOn", []) for line in told["dependencies"]}
    assert set(needs[wheel.name]) == {"numpy==2.4.6", "toy-base==0.1.4", "pytest==9.0.0"}
    assert "iniconfig==2.3.1" in needs["pytest==9.0.0"]
    assert sbom.bill(wheel, versions=versions, moment=1700000000) == text


def test_pins_are_those_of_this_python(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(
        "Some.Name==1.2\nx==1 ; python_full_version < '3.2'\nx==2 ; python_full_version >= '3.2'\n"
    )
    assert sbom.pins(path) == {"some-name": "1.2", "x": "2"}


def test_wheels_take_every_kind_of_file_that_the_packages_have() -> None:
    for package in members.packages():
        files = [path for path in package.source.rglob("*") if "__pycache__" not in path.parts]
        assert {path.suffix for path in files if path.is_file()} <= archives.SUFFIXES


@pytest.mark.integration
def test_a_workspace_is_built_twice_and_looked_into(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = tmp_path / "dist"
    wheels = archives.build(out, root=house)
    stems = ("toy_base-0.1.4", "toy_box-0.3.0")
    assert [wheel.name for wheel in wheels] == [f"{stem}-py3-none-any.whl" for stem in stems]
    ends = ("-py3-none-any.whl", ".tar.gz", ".cdx.json")
    named = {line.split()[1] for line in (out / archives.SUMS).read_text().splitlines()}
    assert named == {stem + end for stem in stems for end in ends}
    with zipfile.ZipFile(wheels[1]) as archive:
        assert {info.date_time for info in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


@pytest.mark.integration
def test_a_build_that_packs_what_it_should_not_is_refused(
    house: Path, box: members.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    (box.source / "cat.png").write_bytes(b"a picture")
    with pytest.raises(ValueError, match=r"cat\.png is of a kind no wheel needs"):
        archives.build(house / "dist", root=house)
    assert not (house / "dist" / archives.SUMS).exists()


def test_a_package_that_cannot_be_built_is_named(box: members.Package, tmp_path: Path) -> None:
    box.pyproject.write_text("[project]\n")
    with pytest.raises(ValueError, match="hatchling could not build toy-box"):
        archives.build_package(box.home, tmp_path, moment=0)
