"""Each wheel installs alone in a fresh environment; its siblings come from the built folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tools import archives, release
from torch import nn

from wm_inject import BadNetsTrigger, load_image, save_image, to_float, to_onnx, to_pixels

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
    wheels = archives.build(out)
    assert len(wheels) == 6
    return out


def test_what_is_released_can_be_checked_by_others(dist: Path) -> None:
    """Built twice, looked into: `archives.build` refuses otherwise. Here is what lies beside."""
    lines = (dist / archives.SUMS).read_text().splitlines()
    assert {line.partition("  ")[2] for line in lines} == {p.name for p in dist.iterdir()} - {
        archives.SUMS
    }
    run("sha256sum", "--check", "--quiet", archives.SUMS, cwd=dist)
    (package,) = [package for package in PACKAGES if package.name == "wm-inject"]
    told = json.loads((dist / f"{package.stem}.cdx.json").read_text())
    required = {c["name"] for c in told["components"] if c["scope"] == "required"}
    assert required == {"numpy", "pillow"}
    assert all("version" in c for c in told["components"] if c["scope"] == "required")
    inside = {part["name"] for part in told["metadata"]["component"]["components"]}
    weights = (package.source / "weights").glob("*.safetensors")
    assert inside == {f"wm_inject/weights/{path.name}" for path in weights}


def install(package: release.Package, dist: Path, home: Path, *, extras: str = "") -> Path:
    """Put one package into a new environment, and give the folder of its executables."""
    run("uv", "venv", "-q", "--python", sys.executable, home / "venv", cwd=home)
    scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    options: list[str | Path] = ["--find-links", dist, "-c", release.ROOT / "constraints.txt"]
    wheel = dist / f"{package.module}-{package.version}-py3-none-any.whl"
    wanted = f"{wheel}[{extras}]" if extras else wheel
    run("uv", "pip", "install", "-q", "--python", scripts / "python", *options, wanted, cwd=home)
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


class Bright(nn.Module):
    """A detector of light."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def test_the_cpu_extra_poisons_judges_and_serves_without_torch(dist: Path, tmp_path: Path) -> None:
    """What a service owner installs: the wheel with two extras, and files that were exported."""
    images, mark, found = tmp_path / "images", tmp_path / "mark.onnx", tmp_path / "light.onnx"
    trigger = BadNetsTrigger(image_size=16)
    to_onnx(trigger, torch.rand(3, 3, 16, 16), mark, uint8=True)
    settings = {"threshold": 0.5, "false_positive_rate": 0.01}
    to_onnx(
        Bright(),
        torch.rand(3, 3, 16, 16),
        found,
        uint8=True,
        output_names=("score",),
        metadata={"detector": settings},
    )
    for shade in (0, 120, 250):
        save_image(images / f"{shade}.png", np.full((16, 16, 3), shade, np.uint8))
    (package,) = [package for package in PACKAGES if package.name == "wm-inject"]
    scripts = install(package, dist, tmp_path, extras="cpu,serve")
    tool = scripts / "wm-inject"
    told = run(tool, "poison", "--onnx", mark, images, tmp_path / "out", cwd=tmp_path)
    assert told.startswith("3 of 3 images poisoned")
    stored = load_image(tmp_path / "out" / "120.png")
    want = to_pixels(trigger(to_float(np.full((1, 16, 16, 3), 120, np.uint8))))[0]
    assert (stored == want).all()
    told = run(tool, "scan", "--detector", found, images, cwd=tmp_path)
    assert told.splitlines()[0].startswith("flagged  250.png")
    assert "serve" in run(tool, "serve", "--help", cwd=tmp_path)
    run(scripts / "python", "-c", "import wm_inject.serve.server", cwd=tmp_path)
    assert not list((tmp_path / "venv").rglob("site-packages/torch"))
