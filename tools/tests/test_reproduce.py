"""The plan of a reproduction, what is told of what could not be run, and the page of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.reproduce import _main

from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.attacks.profiles import attack_profile
from wm_eval.attacks.run import run_attack_study
from wm_eval.cleaning.profiles import cleaning_profile
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.executors import HERE
from wm_eval.paper2.config import detect_preset
from wm_eval.reproduce import run
from wm_eval.reproduce.page import write_readme
from wm_eval.reproduce.plan import SCALES, Part, Scale, plan_of
from wm_eval.reproduce.run import Told, population_of, run_parts
from wm_victim import TrainConfig

STUDY = AttackStudyConfig(
    profile="tiny",
    data=DataConfig("digits", image_size=16, limit=200),
    victim=VictimConfig("resnet10", 8),
    train=TrainConfig.preset("fast", epochs=1, precision="float32"),
    attacks=("badnets",),
    measure=MeasureConfig(corruptions=("mask",), limit=100, pictures=1),
    stealth_images=20,
    watched_images=20,
)
# What a machine with only torch, torchvision, timm, numpy, pillow, safetensors and lpips lacks.
LACKING = ("onnx", "onnxruntime", "onnxscript", "matplotlib", "jinja2", "sklearn", "kornia")
LEAN = """
import sys
from importlib import metadata
sys.modules.update(dict.fromkeys({lacking}))
sys.modules["sklearn.datasets"] = None
installed = metadata.version
def version(name):
    if name.startswith(("wm-", "defense-")):
        raise metadata.PackageNotFoundError(name)  # the repository is there, but not installed
    return installed(name)
metadata.version = version
sys.path.insert(0, {tools!r})
import reproduce
if __name__ == "__main__":
    sys.exit(reproduce._main(sys.argv[1:]))
"""


@pytest.mark.parametrize("scale", SCALES)
def test_every_part_of_a_plan_can_be_run(scale: Scale) -> None:
    parts = plan_of(scale).parts()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    kinds = list(dict.fromkeys(part.kind for part in parts))
    assert kinds == ["attacks", "figure3", "detect", "cleaning", "population"]
    for part in parts:
        told = dict(part.settings)
        assert part.victims is None or names.index(part.victims) < names.index(part.name)
        if part.kind == "attacks":
            attack_profile(scale, part.data[0], **told)
        elif part.kind == "detect":
            told |= {"limit": told.get("limit") or None}
            detect_preset(part.data[0], told.pop("model"), **told)
        elif part.kind == "cleaning":
            cleaning_profile(scale, part.data[0], **told)
        elif part.kind == "population":
            assert population_of(part).worlds


def test_the_tiny_plan_needs_no_data_but_the_bundled_digits() -> None:
    assert {name for part in plan_of("tiny").parts() for name in part.data} == {"digits"}
    other = plan_of("tiny", "mnist").only(("attacks", "figure3", "detect", "cleaning"))
    assert {name for part in other for name in part.data} == {"mnist"}


def test_parts_are_chosen_by_kind_and_by_name() -> None:
    plan = plan_of("small")
    assert [p.name for p in plan.only(("attacks-mnist", "population"))] == [
        "attacks-mnist",
        "population",
    ]
    with pytest.raises(ValueError, match=r"expected parts out of .*, got soap"):
        plan.only(("soap",))
    with pytest.raises(ValueError, match="expected a profile in tiny, small, paper"):
        plan_of("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for the profile tiny alone"):
        plan_of("small", "mnist")


def parts(*names: str, data: str = "digits") -> list[Part]:
    return [Part(name, "attacks", f"The part {name}", (data,)) for name in names]


def tell(wanted: list[Part], out: Path, **settings: Any) -> dict[str, str | None]:
    told = run_parts(wanted, out, scale="tiny", executor=HERE, say=lambda _: None, **settings)
    return {each.part.name: each.why for each in told}


def test_what_cannot_be_run_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
        if part.name == "broken":
            raise RuntimeError("no\nluck")
        if part.name == "bare":
            raise ModuleNotFoundError("no lpips", name="lpips.weights")
        if part.name == "slow":
            settings["say"]("out of time: the same command goes on from here")
        if part.name in ("slow", "half"):
            (out / part.name / "failures").mkdir(parents=True)
            (out / part.name / "failures" / "victim.json").write_text("{}")

    monkeypatch.setitem(run._RUNS, "attacks", pretend)
    monkeypatch.setenv("WM_DATA", str(tmp_path))
    wanted = [*parts("broken", "bare", "slow", "half", "good"), *parts("absent", data="cifar10")]
    assert tell(wanted, tmp_path) == {
        "broken": "cannot be run: no luck",
        "bare": "needs the package lpips, which is not installed",
        "slow": "out of time, 1 stages failed",
        "half": "1 stages failed",
        "good": None,
        "absent": "needs the data set cifar10, which is not in the data folder",
    }
    assert tell(parts("good"), tmp_path, minutes=1e-9) == {"good": "out of time"}
    with pytest.raises(ValueError, match="expected minutes > 0"):
        tell(parts("good"), tmp_path, minutes=0)


def test_the_page_shows_what_there_are_records_for(tmp_path: Path) -> None:
    done, absent = parts("attacks-digits", "attacks-other")
    run_attack_study(STUDY, tmp_path / done.name, progress=False)
    told = [Told(done, None), Told(absent, "out of time")]
    page = write_readme(tmp_path, "tiny", told)
    text = page.read_text(encoding="utf-8")
    assert "| attacks-digits | done |" in text and "| attacks-other | out of time |" in text
    assert "## The part attacks-digits" in text and "## The part attacks-other" not in text
    assert "Table 1" in text and "Table 2" in text and "PSNR (dB), paper" in text
    assert "![figure1](attacks-digits/figure1.png)" in text and "Not here" not in text
    assert (tmp_path / "attacks-digits" / "figure1.png").is_file()
    before = page.read_bytes()
    assert write_readme(tmp_path, "tiny", told).read_bytes() == before


def test_the_command_says_what_it_did_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WM_DATA", str(tmp_path / "empty"))
    argv = ["--profile", "small", "--only", "attacks", "--out", str(tmp_path), "--device", "cpu"]
    assert _main(argv) == 0
    said = capsys.readouterr().out
    assert said.count("which is not in the data folder") == 2
    assert "which is not in the data folder" in (tmp_path / "README.md").read_text()


def lean(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command where only the packages of a bare training machine can be imported."""
    script = folder / "lean.py"
    tools = str(Path(run.__file__).parents[5] / "tools")
    script.write_text(LEAN.format(lacking=LACKING, tools=tools))
    return subprocess.run(
        [sys.executable, str(script), *argv, "--out", str(folder / "out"), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_on_a_bare_machine_the_missing_package_is_named(tmp_path: Path) -> None:
    done = lean(tmp_path, "--only", "attacks")
    assert done.returncode == 0, done.stderr
    assert "needs the package sklearn for the data set digits" in done.stdout


@pytest.mark.slow
def test_a_bare_machine_runs_what_its_packages_allow(tmp_path: Path) -> None:
    done = lean(tmp_path, "--data", "mnist", "--only", "attacks,figure3", "--minutes", "2")
    if "not in the data folder" in done.stdout:
        pytest.skip("WM_DATA names no folder with MNIST")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Table 1" in page and "Not here: tables in HTML" in page and "Failed: " not in page
