"""Each wheel installs alone in a fresh environment; its siblings come from the built folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import release

pytestmark = pytest.mark.slow
PACKAGES = release.packages()


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that must succeed."""
    # The workspace's own settings must not leak into the fresh environment, nor its packages.
    hidden = ("UV_CONSTRAINT", "UV_COMPILE_BYTECODE", "VIRTUAL_ENV", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six wheels, built and looked into."""
    out = tmp_path_factory.mktemp("dist")
    wheels = release.build(out)
    assert len(wheels) == 6
    return out


def install(package: release.Package, dist: Path, home: Path) -> Path:
    """Put one package into a new environment, and give the folder of its executables."""
    run("uv", "venv", "-q", "--python", sys.executable, home / "venv", cwd=home)
    scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    options: list[str | Path] = ["--find-links", dist, "-c", release.ROOT / "constraints.txt"]
    wheel = dist / f"{package.module}-{package.version}-py3-none-any.whl"
    run("uv", "pip", "install", "-q", "--python", scripts / "python", *options, wheel, cwd=home)
    return scripts


@pytest.mark.parametrize("package", PACKAGES, ids=[package.name for package in PACKAGES])
def test_a_wheel_works_alone(package: release.Package, dist: Path, tmp_path: Path) -> None:
    scripts = install(package, dist, tmp_path)
    code = f"import {package.module} as m; print(m.__version__, m.__file__)"
    answer = run(scripts / "python", "-c", code, cwd=tmp_path)
    version, _, path = answer.partition(" ")
    assert version == str(package.version)
    assert path.startswith(str(tmp_path))
    assert package.name in run(scripts / package.name, "--help", cwd=tmp_path)
    assert str(package.version) in run(scripts / package.name, "--version", cwd=tmp_path)


def test_the_base_wheel_brings_numpy_and_pillow_only(dist: Path, tmp_path: Path) -> None:
    (package,) = [package for package in PACKAGES if package.name == "wm-inject"]
    scripts = install(package, dist, tmp_path)
    listing = run(
        *("uv", "pip", "list", "--format", "json", "--python", scripts / "python"), cwd=tmp_path
    )
    assert {entry["name"] for entry in json.loads(listing)} == {"wm-inject", "numpy", "pillow"}
    assert "poison" in run(scripts / "wm-inject", "--help", cwd=tmp_path)
    run(scripts / "python", "-c", "import wm_inject.runtime", cwd=tmp_path)
