"""The six commands on machines as they are: one line, the right exit code, nothing half written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tools.faults import Fault, run_with
from torch import Tensor, nn

from wm_inject import save_image, to_onnx, to_pixels
from wm_inject.core.files import only_writer
from wm_victim import build_classifier, load_dataset, save_classifier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux"),
]


class Case(NamedTuple):
    """A cheap invocation of a command; OUT stands for the folder that it writes to."""

    module: str
    command: str
    codes: tuple[int, ...]  # where nothing is wrong
    exit_error: int


CASES = {
    "wm-inject poison": Case(
        "wm_inject.cli",
        "poison --trigger badnets --image-size 16 photos OUT/poisoned --json OUT/counts.json",
        (0,),
        1,
    ),
    "wm-inject scan": Case(
        "wm_inject.cli", "scan --detector detector.onnx photos --json OUT/found.json", (0,), 1
    ),
    "wm-extract detect": Case(
        "wm_extract.cli", "detect photos --pretrained tiny-32 --json OUT/found.json", (0,), 1
    ),
    "wm-victim train": Case(
        "wm_victim.cli",
        "train --data digits --model resnet10 --width 8 --limit 64 --epochs 2 "
        "--out OUT/victim.safetensors --json OUT/victim.json",
        (0,),
        1,
    ),
    "defense-nc scan": Case(
        "defense_nc.cli",
        "scan victim.safetensors --data digits --images 20 --config nc.toml "
        "--checkpoint OUT/state.safetensors --json OUT/scan.json",
        (0, 1, 2),
        3,
    ),
    "defense-reverse scan": Case(
        "defense_reverse.cli",
        "scan victim.safetensors --data digits --images 20 --config reverse.toml "
        "--checkpoint OUT/state.safetensors --json OUT/scan.json",
        (0, 1, 2),
        3,
    ),
    "wm-eval scan": Case(
        "wm_eval.cli",
        "scan model.onnx --images digits --count 40 --minutes 0.1 --state OUT/state "
        "--json OUT/scan.json --sarif OUT/scan.sarif --html OUT/scan.html",
        (2, 3),
        3,
    ),
    "wm-eval inspect": Case(
        "wm_eval.cli",
        "inspect photos --extractor detector.onnx --csv OUT/found.csv --json OUT/found.json "
        "--html OUT/found.html",
        (0,),
        1,
    ),
}

# The codes that are right under a fault: as if nothing were wrong, or after an error.
NORMAL, ERROR = "normal", "error"
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "no home": (Fault({"HOME": "/nonexistent/home", "XDG_CACHE_HOME": None}), (NORMAL,)),
    "no folder for temporary files": (Fault({"TMPDIR": "/nonexistent/tmp"}), (NORMAL,)),
    "ascii": (Fault({"LC_ALL": "C", "LANG": "C"}, encoding="ascii"), (NORMAL,)),
    "full disk": (Fault(file_bytes=64), (ERROR,)),
    "stdout on a full disk": (Fault(stdout="full"), (ERROR,)),
    "stdout that nobody reads": (Fault(stdout="gone"), (ERROR,)),
    "little memory": (Fault(memory=24), (NORMAL, ERROR)),
    "hardly any memory": (Fault(memory=2), (NORMAL, ERROR)),
}
QUICK = {
    ("wm-inject poison", "full disk"),
    ("wm-inject scan", "ascii"),
    ("wm-extract detect", "stdout on a full disk"),
    ("wm-victim train", "full disk"),
    ("defense-nc scan", "full disk"),
    ("defense-nc scan", "stdout that nobody reads"),
    ("defense-reverse scan", "full disk"),
    ("wm-eval inspect", "ascii"),
    ("wm-eval inspect", "no home"),
}
NAME = os.fsdecode(b"caf\xe9\nflagged  \x1b[31m.png")  # not UTF-8, and obeyed by a terminal


class Brightness(nn.Module):
    """Flags every image that is not black."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores of a batch."""
        return images.mean(dim=(1, 2, 3))


def fitted(features: Tensor, labels: Tensor) -> nn.Parameter:
    """Weights of a linear classifier of ten classes, by least squares."""
    x, y = features.double(), torch.eye(10, dtype=torch.float64)[labels]
    gram = x.T @ x
    ridge = 1e-6 * gram.trace() * torch.eye(len(gram), dtype=torch.float64)
    return nn.Parameter(10 * torch.linalg.solve(gram + ridge, x.T @ y).T.float())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the commands read; they run in this folder."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.png", NAME):
        save_image(folder / "photos" / name, draw.integers(0, 256, (32, 32, 3), np.uint8))
    facts = {"threshold": 0.1, "false_positive_rate": 0.01, "looks_for": "light"}
    to_onnx(
        Brightness(),
        torch.rand(3, 3, 32, 32),
        folder / "detector.onnx",
        uint8=True,
        traced=True,
        output_names=("score",),
        metadata={"detector": facts},
    )
    digits = load_dataset("digits", image_size=16).train
    images, labels = digits.images[:300], digits.labels[:300]
    for number, pixels in enumerate(to_pixels(images)):
        save_image(folder / "digits" / str(int(labels[number])) / f"{number}.png", pixels)
    linear = nn.Linear(16 * 16, 10)
    linear.weight = fitted(images.flatten(1), labels)
    flat = nn.Sequential(nn.Flatten(), linear)
    to_onnx(flat, images[:3], folder / "model.onnx", traced=True, relative=True)
    model = build_classifier(
        "resnet10", num_classes=10, channels=1, image_size=16, width=16, seed=0
    ).eval()
    with torch.no_grad():
        model.head.weight = fitted(model.features(images), labels)
    save_classifier(model, folder / "victim.safetensors")
    settings = {
        "nc": 'steps = 2\nstarts = ["faint"]\nengine = "single"\nrace = false\n',  # saves labels
        "reverse": "steps = 2\nwidth = 4\n",
    }
    for name, text in settings.items():
        (folder / f"{name}.toml").write_text(f"[scan]\n{text}", encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def matrix() -> list[object]:
    """Every command under every fault; all but a handful are slow together."""
    return [
        pytest.param(case, fault, marks=() if (case, fault) in QUICK else pytest.mark.slow)
        for case in CASES
        for fault in FAULTS
    ]


@pytest.mark.parametrize(("name", "lack"), matrix())
def test_a_command_ends_well_where_something_is_wrong(
    inputs: Path, tmp_path: Path, name: str, lack: str
) -> None:
    case, (fault, outcomes) = CASES[name], FAULTS[lack]
    out = tmp_path / "out"
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(inputs.rglob("*"))
    arguments = [part.replace("OUT", str(out)) for part in case.command.split()]
    environment = {"HOME": str(home), "TMPDIR": str(home), **fault.environment}
    end = run_with(
        Fault(environment, fault.file_bytes, fault.memory, fault.encoding, fault.stdout),
        case.module,
        arguments,
    )
    codes = {NORMAL: case.codes, ERROR: (case.exit_error,)}
    assert end.code in [code for outcome in outcomes for code in codes[outcome]], end
    assert "Traceback" not in end.err
    errors = [line for line in end.err.splitlines() if line.startswith("error: ")]
    if "OUT/state" in case.command and lack == "full disk" and name != "wm-eval scan":
        assert errors[0].startswith(f"error: cannot write {out}/state")
    failed = outcomes == (ERROR,) and fault.stdout != "gone"
    assert len(errors) == 1 if failed else len(errors) <= 1, end.err
    # Nothing half written, and nothing beside what was asked for.
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    assert sorted(inputs.rglob("*")) == before and not list(home.iterdir())
    for path in out.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def test_a_name_cannot_forge_a_line_nor_stop_a_report(inputs: Path, tmp_path: Path) -> None:
    for module, arguments in (
        ("wm_inject.cli", ("scan", "--detector", "detector.onnx")),
        ("wm_eval.cli", ("inspect", "--extractor", "detector.onnx", "--csv", tmp_path / "x.csv")),
    ):
        folder = tmp_path / module
        (folder).mkdir()
        (folder / NAME).write_bytes(b"no picture")
        save_image(folder / "good.png", np.zeros((32, 32, 3), np.uint8))
        outcome = run_with(Fault(encoding="ascii"), module, [*arguments, folder])
        assert outcome.code == 0, outcome
        assert not [line for line in outcome.out.splitlines() if line.startswith("flagged")]
        assert "\\udce9" in outcome.out and "\x1b" not in outcome.out
    assert "\\udce9" in (tmp_path / "x.csv").read_text(encoding="utf-8")


def test_a_full_disk_keeps_the_last_checkpoint(inputs: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "v.safetensors", tmp_path / "v.training.safetensors"
    train = f"train --data digits --model resnet10 --width 8 --limit 64 --epochs 400 --out {out}"
    stopped = run_with(Fault(), "wm_victim.cli", train.split(), end=checkpoint.exists)
    assert (stopped.code, stopped.err) == (143, "terminated\n")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    last = checkpoint.read_bytes()
    full = run_with(Fault(file_bytes=4096), "wm_victim.cli", train.split())
    assert full.code == 1 and full.err.startswith(f"error: cannot write {checkpoint}: ")
    assert full.err.count("\n") == 1 and checkpoint.read_bytes() == last
    again = run_with(
        Fault(),
        "wm_victim.cli",
        train.split(),
        end=lambda: checkpoint.read_bytes() != last,
    )
    assert again.code == 143


def test_a_model_that_is_being_opened_leaves_nothing_when_the_command_is_ended(
    inputs: Path, tmp_path: Path
) -> None:
    def opening() -> bool:
        return any(tmp_path.glob("wm-open-*/stderr"))

    scan = ("scan", "model.onnx", "--images", "digits")
    outcome = run_with(Fault({"TMPDIR": str(tmp_path)}), "wm_eval.cli", scan, end=opening)
    assert outcome.code == 143 and outcome.err.endswith("terminated\n")
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_into_one_folder(inputs: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        poison = f"poison --trigger badnets --image-size 16 photos {tmp_path / 'out'}"
        outcome = run_with(Fault(), "wm_inject.cli", poison.split())
    assert outcome.code == 1 and "another process is writing to" in outcome.err
    assert not list((tmp_path / "out").iterdir())
