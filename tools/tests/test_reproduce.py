"""The plans of a reproduction, what is said of what could not be run, and the page of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import reproduce
from tools.reproduce import PLANS, Part, _main, run_parts

from wm_eval import engine
from wm_eval.config import load_study
from wm_eval.engine import Outcome
from wm_eval.executors import HERE
from wm_eval.records import Failure

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


def test_every_study_of_a_plan_ships_and_what_shares_a_folder_shares_victims() -> None:
    for parts in PLANS.values():
        kinds = list(dict.fromkeys(part.kind for part in parts))
        assert kinds == ["attacks", "detection", "mitigation", "population"]
        folders = {part.folder: load_study(part.study) for part in reversed(parts)}
        for part in parts:
            one, other = load_study(part.study), folders[part.folder]
            same = ("data", "victim", "train", "triggers", "target", "seeds", "measure", "profile")
            assert not [name for name in same if getattr(one, name) != getattr(other, name)]


def tell(parts: list[Part], out: Path, **settings: Any) -> dict[str, str]:
    return run_parts(parts, out, executor=HERE, say=lambda _: None, **settings)


def test_what_cannot_be_run_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = {"scan": Failure("scan", {}, "no luck")}
    ends: dict[str, Any] = {
        "broken": RuntimeError("no\nluck"),
        "bare": ModuleNotFoundError("no lpips", name="lpips.weights"),
        "slow": Outcome({}, failure, ("a",)),
        "half": Outcome({}, failure, ()),
        "good": Outcome({}, {}, ()),
    }

    def pretend(stages: Any, out: Path, **settings: Any) -> Outcome:
        end = ends[out.name]
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(engine, "run", pretend)
    monkeypatch.setenv("WM_DATA", str(tmp_path))
    for name in ends:
        status = tell([Part("attacks-digits-tiny", name)], tmp_path)
        ends[name] = status["attacks-digits-tiny"]
    assert ends == {
        "broken": "cannot be run: no luck",
        "bare": "needs the package lpips, which is not installed",
        "slow": "out of time, 1 stages failed",
        "half": "1 stages failed",
        "good": "done",
    }
    text = (tmp_path / "README.md").read_text()
    assert "| attacks-digits-tiny | done |" in text and "No page yet" in text
    absent = tell([Part("attacks-cifar10", "good")], tmp_path)
    assert absent == {
        "attacks-cifar10": "needs the data set cifar10, which is not in the data folder"
    }
    late = tell([Part("attacks-digits-tiny", "good")], tmp_path, minutes=1e-9)
    assert late == {"attacks-digits-tiny": "out of time"}
    with pytest.raises(ValueError, match="minutes > 0"):
        tell([], tmp_path, minutes=0)


def test_studies_are_chosen_by_kind_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[list[str]] = []

    def note(parts: list[Part], out: Path, **_: Any) -> dict[str, str]:
        chosen.append([part.study for part in parts])
        return {}

    monkeypatch.setattr(reproduce, "run_parts", note)
    out = ["--out", str(tmp_path)]
    _main([*out, "--profile", "small", "--only", "attacks-mnist,population"])
    _main([*out, "--data", "mnist"])
    assert chosen[0] == ["attacks-mnist", "population"] and len(chosen[1]) == 3
    for wrong in (["--only", "soap"], ["--profile", "small", "--data", "mnist"]):
        with pytest.raises(ValueError, match="expected"):
            _main([*out, *wrong])


@pytest.mark.slow
def test_it_runs_with_what_few_packages_a_machine_has(tmp_path: Path) -> None:
    tools = Path(reproduce.__file__).parent
    script = tmp_path / "lean.py"
    script.write_text(LEAN.format(lacking=LACKING, tools=str(tools)))
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--minutes", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the package sklearn for the data set digits" in done.stdout
