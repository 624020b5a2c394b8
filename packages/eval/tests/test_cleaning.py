"""Cleaning a study's victims: what is recorded, what is reused, and what may fail.

The victims are trained for seconds and the scans are stand-ins whose verdict is given; what the
mitigations do to a backdoor is for the tests of their packages and for results/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_nc import InvertedTrigger, ScanReport, Unlearning, Verdict, judge
from defense_nc.protocols import Repaired
from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.attacks.run import run_attack_study
from wm_eval.cleaning import run, stages
from wm_eval.cleaning.config import CleaningConfig
from wm_eval.cleaning.run import run_cleaning
from wm_eval.cleaning.victims import take_victims
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.records import read_record
from wm_inject import load_checkpoint
from wm_victim import TrainConfig, load_classifier, load_dataset, predict

STUDY = AttackStudyConfig(
    name="test",
    profile="tiny",
    data=DataConfig(name="digits", image_size=16, limit=200),
    victim=VictimConfig(model="resnet10", width=8),
    train=TrainConfig.preset("fast", epochs=1, precision="float32"),
    attacks=("clean", "badnets"),
    measure=MeasureConfig(corruptions=("none",), limit=100),
    watched_images=20,
)
CONFIG = CleaningConfig(
    study=STUDY,
    methods=("fine-tuning", "unlearning-nc"),
    shares=(0.1, 0.2),
    steps=2,
    images=40,
)


@dataclass
class Scans:
    """Stands in for every detector: names the given labels, one verdict after the other."""

    named: tuple[tuple[int, ...], ...]
    asked: list[int]
    config: Any = None

    @property
    def seen(self) -> int:
        return len(self.asked)

    def scan(self, model: nn.Module, images: Tensor, **rest: Any) -> ScanReport:
        named = self.named[self.seen] if self.seen < len(self.named) else ()
        self.asked.append(1)
        pattern = torch.ones(images.shape[1:])
        triggers = {
            label: InvertedTrigger(torch.full_like(pattern[:1], 0.1), pattern, target=label)
            for label in range(10)
        }
        scores = torch.linspace(50.0, 59.0, 10)
        report = judge("fake", scores, torch.ones(10), floor=0.9, triggers=triggers)
        verdict = Verdict.BACKDOORED if named else Verdict.CLEAN
        return replace(report, verdict=verdict, suspected=named)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scans]:
    def use(*named: tuple[int, ...]) -> Scans:
        made = Scans(named, [])
        monkeypatch.setattr(stages, "find_detector", lambda name, **_: made)
        return made

    return use


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    run_attack_study(STUDY, out, parts=("cells",), progress=False)
    assert not list((out / "failures").iterdir())
    return out


@pytest.fixture
def out(victims: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(victims, tmp_path / "out"))


def go(config: CleaningConfig, out: Path, **rest: Any) -> list[str]:
    """Run, and give the names of the stages that were done, the failed ones marked."""
    said: list[str] = []
    run_cleaning(config, out, progress=False, say=said.append, **rest)
    return [line for line in said if not line.endswith(": done before")]


def values(out: Path, name: str) -> dict[str, Any]:
    return dict(read_record(out / "records" / f"{name}.json").values)


def all_bytes(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("records/*.json"), *folder.rglob("*.safetensors")]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in kept if not p.name.endswith("env.json")
    }


def test_a_backdoored_and_a_clean_victim(out: Path, scans: Callable[..., Scans]) -> None:
    before = all_bytes(out)
    # The clean victim, the backdoored one, and what unlearning has left of it, twice.
    scans((), (0,), (), (4,))
    done = go(CONFIG, out)
    shares = ("0.1", "0.2")
    expected = ["cleaning"]
    for attack in ("clean", "badnets"):
        expected += [f"before-{attack}-0", f"scan-nc-{attack}-0"]
        expected += [f"clean-{m}-{s}-{attack}-0" for m in CONFIG.rows for s in shares]
        if attack == "clean":
            expected += [f"forced-unlearning-nc-{s}-clean-0" for s in shares]
        else:
            expected += [f"rescan-nc-unlearning-nc-{s}-badnets-0" for s in shares]
    assert done == [f"{name}: started" for name in expected]
    assert not list((out / "failures").iterdir())
    # The victims are those of the attack study, bit for bit.
    after = all_bytes(out)
    assert {name: after[name] for name in before} == before

    tuned = values(out, "clean-fine-tuning-0.2-badnets-0")
    assert (tuned["images"], tuned["steps"], tuned["labels"]) == (40, 2, [])
    assert tuned["cleaned"] and tuned["why"].startswith("blind")
    low, high = tuned["der_interval"]
    assert low <= tuned["der"] <= high and tuned["after"]["n_attack"] > 80
    unlearned = values(out, "clean-unlearning-nc-0.1-badnets-0")
    assert (unlearned["images"], unlearned["labels"], unlearned["forced"]) == (20, [0], False)
    assert unlearned["why"] == "the scan named 0"
    first, second = (values(out, f"rescan-nc-unlearning-nc-{s}-badnets-0") for s in shares)
    assert first["agrees"] and first["named_before"] == [0] and first["named"] == []
    assert not second["agrees"] and second["named"] == [4] and second["verdict"] == "backdoored"
    # Seconds stand beside a record, not in it.
    told = json.loads((out / "records" / "scan-nc-badnets-0.env.json").read_text())
    assert told["seconds"] >= 0


def test_on_a_clean_victim_only_force_unlearns_anything(
    out: Path, scans: Callable[..., Scans]
) -> None:
    scans(())
    go(replace(CONFIG, study=replace(STUDY, attacks=("clean",)), shares=(0.1,)), out)
    left = values(out, "clean-unlearning-nc-0.1-clean-0")
    assert not left["cleaned"] and left["why"] == "nothing named: not cleaned (clean)"
    assert left["after"] == left["before"] and left["steps"] == 0 and left["der"] is None
    forced = values(out, "forced-unlearning-nc-0.1-clean-0")
    assert forced["forced"] and forced["cleaned"] and "nearest label" in forced["why"]
    assert forced["labels"] == [0] and forced["asr_change"] is None  # 0 has the smallest score
    assert values(out, "clean-fine-tuning-0.1-clean-0")["acc_change"]["n"] == 100


@pytest.mark.parametrize("named", [(), (3,), (0, 3)])
def test_what_the_scan_named_and_what_is_forced_are_told_apart(
    out: Path, scans: Callable[..., Scans], named: tuple[int, ...]
) -> None:
    scans(named)
    study = replace(STUDY, attacks=("badnets",))
    methods = ("unlearning-nc", "neuron-pruning")
    go(replace(CONFIG, study=study, methods=methods, shares=(0.1,), rescan=False), out)
    for method in methods:
        mine = values(out, f"clean-{method}-0.1-badnets-0")
        assert mine["labels"] == list(named) and mine["cleaned"] == bool(named)
        assert not mine["forced"]
        forced = out / "records" / f"forced-{method}-0.1-badnets-0.json"
        assert forced.exists() == (0 not in named)
        if forced.exists():
            told = read_record(forced).values
            assert told["forced"] and told["labels"] == [0] and "true target" in told["why"]
    if not named:
        assert values(out, "clean-unlearning-nc-0.1-badnets-0")["der"] == 0.5


def test_an_inconclusive_scan_names_nothing(
    out: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans((0,))
    scan = Scans.scan

    def doubtful(*given: Any, **rest: Any) -> ScanReport:
        return replace(scan(*given, **rest), verdict=Verdict.INCONCLUSIVE)

    monkeypatch.setattr(Scans, "scan", doubtful)
    study = replace(STUDY, attacks=("badnets",))
    go(replace(CONFIG, study=study, methods=("unlearning-nc",), shares=(0.1,)), out)
    assert values(out, "scan-nc-badnets-0")["suspected"] == [0]
    left = values(out, "clean-unlearning-nc-0.1-badnets-0")
    assert not left["cleaned"] and left["why"].endswith("(inconclusive)")
    assert values(out, "forced-unlearning-nc-0.1-badnets-0")["cleaned"]


def test_what_is_done_is_not_done_again(out: Path, scans: Callable[..., Scans]) -> None:
    config = replace(CONFIG, study=replace(STUDY, attacks=("badnets",)), shares=(0.1,))
    made = scans((0,))
    go(config, out)
    seen, before = made.seen, all_bytes(out)
    assert go(config, out) == [] and made.seen == seen and all_bytes(out) == before
    more = go(replace(config, shares=(0.1, 0.3)), out)
    assert all("0.3" in line for line in more[1:]) and len(more) == 4


def test_a_killed_run_ends_with_the_same_bytes(
    out: Path, tmp_path: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Path(shutil.copytree(out, tmp_path / "killed"))
    config = replace(CONFIG, study=replace(STUDY, attacks=("badnets",)), shares=(0.1,))
    scans((0,))
    go(config, out)

    def dying(*_: Any) -> Any:
        raise KeyboardInterrupt

    scans((0,))
    monkeypatch.setattr(stages, "named_labels", dying)
    with pytest.raises(KeyboardInterrupt):
        go(config, killed)
    monkeypatch.undo()
    scans((0,))
    go(config, killed)
    assert all_bytes(killed) == all_bytes(out)


def test_a_failure_says_why_and_the_others_go_on(
    out: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans((0,))
    config = replace(CONFIG, study=replace(STUDY, attacks=("badnets",)), shares=(0.1,))

    def diverge(*_: Any, **__: Any) -> Repaired:
        raise RuntimeError("the loss\nbecame nan")

    with monkeypatch.context() as patch:
        patch.setattr(Unlearning, "repair", diverge)
        said = go(config, out)
    name = "clean-unlearning-nc-0.1-badnets-0"
    assert f"{name}: failed: the loss became nan" in said
    told = json.loads((out / "failures" / f"{name}.json").read_text())
    assert (told["attack"], told["seed"], told["reason"]) == ("badnets", 0, "the loss became nan")
    assert values(out, "clean-fine-tuning-0.1-badnets-0")["cleaned"]
    # What is there to scan again is known when the cleaning has succeeded.
    assert go(config, out) == [
        f"{name}: started",
        "rescan-nc-unlearning-nc-0.1-badnets-0: started",
    ]
    assert not list((out / "failures").iterdir())


def test_a_scan_that_fails_takes_what_needs_it_along(
    out: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans()

    def refuse(*_: Any, **__: Any) -> ScanReport:
        raise ValueError("no such images")

    monkeypatch.setattr(Scans, "scan", refuse)
    go(replace(CONFIG, study=replace(STUDY, attacks=("badnets",)), shares=(0.1,)), out)
    why = "scan-nc-badnets-0 failed: no such images"
    told = json.loads((out / "failures" / "clean-unlearning-nc-0.1-badnets-0.json").read_text())
    assert told["reason"] == why
    assert values(out, "clean-fine-tuning-0.1-badnets-0")["cleaned"]


def test_the_time_runs_out_between_stages(
    out: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans((), (0,))
    config = replace(CONFIG, methods=("fine-tuning",), shares=(0.1,))
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    said = go(config, out, minutes=1)
    assert said[-1] == "out of time: the same command goes on from here"
    assert (out / "records" / "before-clean-0.json").exists()
    assert not (out / "records" / "before-badnets-0.json").exists()
    monkeypatch.undo()
    assert "before-badnets-0: started" in go(config, out)


def test_victims_are_taken_from_another_folder_which_is_only_read(
    victims: Path, tmp_path: Path
) -> None:
    before = all_bytes(victims)
    config = replace(CONFIG, methods=("fine-tuning",), shares=(0.1,))
    said = go(config, tmp_path, victims=victims)
    assert said[0] == f"3 records of victims taken from {victims}"
    assert not any("victim-plain" in line for line in said[1:])
    assert all_bytes(victims) == before
    assert take_victims(victims, tmp_path) == []


def test_victims_of_another_recipe_are_trained_anew(victims: Path, tmp_path: Path) -> None:
    study = replace(STUDY, attacks=("clean",), train=replace(STUDY.train, lr=0.02))
    said = go(
        replace(CONFIG, study=study, methods=("fine-tuning",), shares=(0.1,)),
        tmp_path,
        victims=victims,
    )
    assert "victim-plain-clean-0: started" in said


def test_what_is_kept_can_be_read_back(out: Path, scans: Callable[..., Scans]) -> None:
    scans((0,))
    go(replace(CONFIG, study=replace(STUDY, attacks=("badnets",)), shares=(0.1,)), out)
    models = out / "models"
    kept = load_checkpoint(models / "outcomes-badnets-0.safetensors", kind="outcomes").state
    assert {len(column) for column in kept.values()} == {100}
    right = int(kept["correct"].sum())
    assert values(out, "before-badnets-0")["measured"]["cda"] == pytest.approx(right / 100)
    assert (models / "reversed-nc-badnets-0-0.safetensors").is_file()
    cleaned = load_classifier(models / "cleaned-unlearning-nc-0.1-badnets-0.safetensors")
    victim = load_classifier(models / "victim-plain-badnets-0.safetensors")
    pairs = zip(cleaned.parameters(), victim.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    # Measured again, the cleaned model gives what its record says.
    test = load_dataset("digits", image_size=16, limit=200).test
    answers = predict(cleaned, test.images[:100]).argmax(1)
    share = float((answers == test.labels[:100]).double().mean())
    assert values(out, "clean-unlearning-nc-0.1-badnets-0")["after"]["cda"] == pytest.approx(share)


def test_refusals(tmp_path: Path, victims: Path) -> None:
    with pytest.raises(ValueError, match="expected minutes > 0"):
        run_cleaning(CONFIG, tmp_path, minutes=0)
    with pytest.raises(ValueError, match="device"):
        run_cleaning(CONFIG, tmp_path, device="tpu")
    with pytest.raises(ValueError, match="below 10 classes"):
        run_cleaning(replace(CONFIG, study=replace(STUDY, target=10)), tmp_path)
    with pytest.raises(ValueError, match="expected settings of NAD"):
        bad = replace(CONFIG, methods=("nad",), settings={"nad": {"soap": 1}})
        run_cleaning(bad, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected records"):
        take_victims(tmp_path, tmp_path / "out")
    empty = Path(shutil.copytree(victims, tmp_path / "empty"))
    for path in (empty / "records").glob("victim-*"):
        path.unlink()
    with pytest.raises(ValueError, match="expected victims of an attack study"):
        take_victims(empty, tmp_path / "out")
