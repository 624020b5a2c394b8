"""The commands ``detect`` and ``figure3``, and what figure 3 is drawn from."""

from __future__ import annotations

import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch

from defense_nc import judge
from wm_eval import cli
from wm_eval.attacks.config import CLEAN
from wm_eval.paper2 import index_scans
from wm_eval.paper2.index_figure import write_index_figure
from wm_eval.paper2.index_scans import find_victims, scan_victims
from wm_eval.records import Record, read_record, read_records, write_record
from wm_eval.tables import ABSENT
from wm_victim import build_classifier, load_dataset, save_classifier

SIZE, LIMIT = 16, 100


def main(*argv: str) -> int:
    """The two commands as ``wm-eval`` has them."""
    return cli.main(argv)


@pytest.fixture
def victims(tmp_path: Path) -> Path:
    """A folder as a study of attacks leaves it, with untrained victims."""
    folder = tmp_path / "victims"
    data = load_dataset("digits", image_size=SIZE, limit=LIMIT)
    values: dict[str, Any] = {
        "name": "digits",
        "image_size": SIZE,
        "fingerprint": data.fingerprint,
    }
    write(folder, "data", 0, values, data.fingerprint)
    for attack, seed in ((CLEAN, 0), ("watermark", 0), ("badnets", 1), ("badnets", 0)):
        model = build_classifier(
            "resnet10", num_classes=10, channels=1, image_size=SIZE, width=8, seed=seed
        )
        name = f"victim-plain-{attack}-{seed}"
        save_classifier(model, folder / "models" / f"{name}.safetensors")
        write(folder, name, seed, {"attack": attack}, data.fingerprint, limit=LIMIT)
    cell = {"target": 0, "corruptions": {"none": {"asr": 0.98}}}
    write(folder, "cell-plain-badnets-0", 0, cell, data.fingerprint)
    return folder


def write(folder: Path, name: str, seed: int, values: Any, data: str, **settings: Any) -> None:
    record = Record(name, {"settings": settings}, seed, data, values)
    write_record(folder / "records" / f"{name}.json", record)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, make_up_scans: Any) -> list[int]:
    """In place of every scan: label 0 stands out, for every second victim."""
    seen: list[int] = []

    def scan(name: str, model: Any, images: Any, **given: Any) -> Any:
        seen.append(len(images))
        scores = torch.linspace(50, 60, 10)
        if len(seen) % 2:
            scores[0] = 3.0
        return judge("fake", scores, torch.ones(10), floor=0.9, seed=given["seed"])

    make_up_scans(monkeypatch, scan)
    return seen


def test_every_victim_is_scanned_once(victims: Path, tmp_path: Path, asked: list[int]) -> None:
    before = sorted(victims.rglob("*"))
    out = tmp_path / "out"
    told: list[str] = []
    for _ in range(2):
        folder = scan_victims(victims, out, images=30, progress=False, say=told.append)
    assert asked == [30] * 4 and sorted(victims.rglob("*")) == before
    records = read_records(folder)
    order = ["badnets-0", "badnets-1", "watermark-0", "clean-0"]
    assert [line.split(":")[0] for line in told[:4]] == [f"scan-nc-{name}" for name in order]
    assert set(records) == {f"scan-nc-{name}" for name in order}
    known = records["scan-nc-badnets-0"].values
    assert (known["true_target"], known["asr"], known["data"]) == (0, 0.98, "digits")
    assert records["scan-nc-badnets-1"].values["asr"] is None


def test_a_victim_that_was_trained_anew_is_scanned_anew(
    victims: Path, tmp_path: Path, asked: list[int]
) -> None:
    scan_victims(victims, tmp_path / "out", images=30, progress=False, say=lambda _: None)
    model = build_classifier(
        "resnet10", num_classes=10, channels=1, image_size=SIZE, width=8, seed=9
    )
    save_classifier(model, victims / "models" / "victim-plain-badnets-0.safetensors")
    scan_victims(victims, tmp_path / "out", images=30, progress=False, say=lambda _: None)
    assert len(asked) == 5


def test_figure_3_is_drawn_and_repeats(victims: Path, tmp_path: Path, asked: list[int]) -> None:
    out = tmp_path / "out"
    scan_victims(victims, out, images=30, progress=False, say=lambda _: None)
    paths = write_index_figure(out)
    assert [path.name for path in paths] == [
        "figure3.svg",
        "figure3.md",
        "figure3.tex",
        "figure3.csv",
        "figure3.html",
    ]
    xml.dom.minidom.parse(str(paths[0]))
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_index_figure(out)] == first
    table = paths[1].read_text()
    rows = {
        row.split("|")[1].strip(): row.split("|")[2:-1]
        for row in table.splitlines()[6:]
        if row.startswith("|")
    }
    badnets = [cell.strip() for cell in rows["BadNets"]]
    assert badnets[2:] == ["1 backdoored, 1 clean", "1 of 1", "98.0 %", "2"]
    clean = [cell.strip() for cell in rows["No attack (clean victim)"]]
    assert clean[3:] == [ABSENT, ABSENT, "1"]


def test_an_infinite_index_is_drawn(tmp_path: Path) -> None:
    values = {
        "attack": "badnets",
        "defence": "nc",
        "data": "digits",
        "n_images": 9,
        "paper_index": None,
        "paper_index_low": None,
        "verdict": "backdoored",
        "suspected": [0],
        "true_target": 0,
        "asr": 1.0,
        "paper_flagged": [0],
    }
    write(tmp_path, "scan-nc-badnets-0", 0, values, "abc")
    assert "infinite" in write_index_figure(tmp_path)[0].read_text()


def test_time_runs_out_between_scans(
    victims: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 40))
    stopped = type("Clock", (), {"monotonic": lambda: next(clock)})
    monkeypatch.setattr(index_scans, "time", stopped)
    told: list[str] = []
    out = tmp_path / "out"
    scan_victims(victims, out, images=30, minutes=1, progress=False, say=told.append)
    assert told[-1] == "out of time: the same command goes on from here" and len(asked) == 1


def test_what_cannot_be_scanned_is_refused(victims: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, told in (
        ({"minutes": 0}, "expected minutes > 0"),
        ({"images": 1}, "expected at least 2 images"),
        ({"device": "tpu"}, "expected device"),
        ({"name": "strip"}, "expected a detector"),
        ({"preset": "vast"}, "expected a preset"),
    ):
        with pytest.raises(ValueError, match=told):
            scan_victims(victims, out, **change)
    with pytest.raises(ValueError, match="expected another folder"):
        scan_victims(victims, victims)
    with pytest.raises(ValueError, match="expected models/victim-plain-ATTACK-SEED"):
        find_victims(out)
    with pytest.raises(ValueError, match="expected records"):
        write_index_figure(out)
    data = read_record(victims / "records" / "data.json")
    write(victims, "data", 0, {**data.values, "fingerprint": "another"}, "another")
    with pytest.raises(ValueError, match="expected the images of the victims, another, got"):
        scan_victims(victims, out)


def test_scans_of_two_detectors_are_refused(tmp_path: Path) -> None:
    for name in ("nc", "reverse"):
        values = {"attack": "badnets", "defence": name}
        write(tmp_path, f"scan-{name}-badnets-0", 0, values, "abc")
    with pytest.raises(ValueError, match="expected the scans of one detector"):
        write_index_figure(tmp_path)


def test_figure3_command(
    victims: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("figure3", "--victims", str(victims), "--images", "30", "--device", "cpu") == 0
    assert (victims / "figure3" / "figure3.svg").is_file()
    assert "figure3.svg" in capsys.readouterr().out


def test_detect_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def run(config: Any, out: Path, **given: Any) -> Path:
        seen.update(config=config, given=given)
        for attack in ("badnets", CLEAN):
            for seed in config.seeds:
                target = None if attack == CLEAN else 0
                report = judge(
                    "fake", torch.linspace(50, 60, 10), torch.ones(10), floor=0.9
                ).to_dict()
                more = {"attack": attack, "defence": "nc", "true_target": target}
                more |= {"score_median": 55.0} | (
                    {} if target is None else {"case": 4, "paper_case": 4}
                )
                write(out, f"scan-nc-{attack}-{seed}", seed, report | more, "abc")
        (out / "failures").mkdir()
        return out / "records"

    monkeypatch.setattr("wm_eval.paper2.run.run_detect", run)
    out = tmp_path / "out"
    options = "--data mnist --arch resnet10 --width 8 --attack badnets --seeds 2 --limit 99"
    more = "--epochs 3 --preset robust --detectors nc --minutes 5 --images 40 --shares 0.02"
    wanted = [*options.split(), *more.split(), "--methods", "fine-tuning", "--seed", "4"]
    assert main("detect", *wanted, "--device", "cpu", "--out", str(out)) == 0
    config = seen["config"]
    assert (config.attack, config.seeds, config.detectors) == ("badnets", (4, 5), ("nc",))
    assert (config.victim.model, config.victim.width, config.data.limit) == ("resnet10", 8, 99)
    assert (config.train.epochs, config.preset, config.images) == (3, "robust", 40)
    assert (config.cleaning_shares, config.cleaners) == ((0.02,), ("fine-tuning",))
    assert seen["given"]["minutes"] == 5
    assert seen["given"]["parts"] == ("detection", "cleaning", "pictures")
    said = capsys.readouterr().out
    assert "nc            on badnets     target named in 0 of 2" in said
    assert "detection.md" in said and "figure2-badnets.svg" in said and "skipped" in said


def test_wrong_settings_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("detect", "--attack", "strip", "--out", str(tmp_path)) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main("figure3", "--victims", str(tmp_path)) == 1


def test_the_parsers_need_no_torch() -> None:
    program = "import sys, wm_eval.paper2.cli\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
