"""The reverse-generator paper's experiment, with stand-ins for all that trains or reverses."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_nc import InvertedTrigger, Repaired, ScanReport, Unlearning, judge
from defense_reverse import Closeness, ReversedTrigger, UNetGenerator, compare_triggers
from wm_eval.attacks import stages as attack_stages
from wm_eval.config import DataConfig, VictimConfig
from wm_eval.paper2 import run as running
from wm_eval.paper2.config import DetectConfig, detect_preset
from wm_eval.paper2.figures import write_figures
from wm_eval.paper2.run import PARTS, run_detect
from wm_eval.paper2.stages import Alternating
from wm_eval.paper2.summary import Cleaning, Scan, read_detection, summarise_detection
from wm_eval.paper2.tables import write_tables
from wm_eval.records import read_record, read_records
from wm_eval.workspace import Workspace
from wm_inject import LpipsUnavailable
from wm_victim import TrainConfig, TrainHistory, load_dataset

SIZE = 16
TINY = DetectConfig(
    data=DataConfig("digits", image_size=SIZE, limit=200),
    victim=VictimConfig("resnet10", 8),
    train=TrainConfig.preset("fast", epochs=1, precision="float32"),
    attack="badnets",
    profile="tiny",
    seeds=(0, 1),
    target=3,
    detectors=("nc", "reverse"),
    images=20,
    cleaning_shares=(0.05, 0.2),
    cleaning=Unlearning.preset("reverse", epochs=1),
    rates=(1e-3, 1e-1),
    tested=50,
    compared=8,
    pictures=2,
)


def planted(model: nn.Module) -> bool:
    """What the stand-in for training has written into the head's bias."""
    assert isinstance(model.head, nn.Linear)
    return bool(model.head.bias[0] == 1)


def train(model: nn.Module, data: Any, *, plan: Any = None, hook: Any = None, **_: Any) -> Any:
    """In place of training: mark the model, and say whether there was anything to learn."""
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        model.head.bias.fill_(float(plan is not None or hook is not None))
    model.eval()
    return TrainHistory((1.0,), (0.1,), (1.0,), ({"cda": 0.1, "asr": 0.1},))


def trigger(name: str, label: int, images: Tensor) -> nn.Module:
    """A reversed trigger; its own for every label."""
    channels = images.shape[1]
    if name == "nc":
        mask = torch.zeros(1, SIZE, SIZE)
        mask[:, :2, : label + 1] = 1
        return InvertedTrigger(mask, torch.ones(channels, SIZE, SIZE), target=label)
    generator = UNetGenerator(channels=channels, width=1, depth=1, residual=True, seed=label)
    with torch.no_grad():
        generator.head.bias.fill_(0.02 * (label + 1))
    return ReversedTrigger(generator, target=label, success_rate=1.0, residual_norm=0.1)


class Looks:
    """In place of every detector's scan; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, int, int]] = []
        self.missing = False  # no weights of LPIPS

    def scan(self, name: str, model: nn.Module, images: Tensor, **given: Any) -> ScanReport:
        if name == "reverse-lpips" and self.missing:
            raise LpipsUnavailable("LPIPS needs its trained weights, no weights found")
        bad = planted(model)
        self.asked.append((name, bad, given["seed"], len(images)))
        scores = torch.linspace(50, 60, 10)
        if bad:
            scores[3] = 2.0  # the target
            if name == "nc":
                scores[3], scores[7] = 55.5, 2.0  # another label instead
        triggers = {k: trigger(name, k, images) for k in range(10)}
        return judge("fake", scores, torch.ones(10), floor=0.9, triggers=triggers)


def stand_in(monkeypatch: pytest.MonkeyPatch, make_up_scans: Any) -> Looks:
    looks = Looks()
    monkeypatch.setattr(attack_stages, "train_classifier", train)
    make_up_scans(monkeypatch, looks.scan)
    return looks


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, make_up_scans: Any) -> Looks:
    return stand_in(monkeypatch, make_up_scans)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_up_scans: Any) -> tuple[Path, Looks]:
    """All parts of the experiment, for two seeds."""
    out = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as monkeypatch:
        looks = stand_in(monkeypatch, make_up_scans)
        go(TINY, out)
    return out, looks


def go(config: DetectConfig, out: Path, *parts: str, **more: Any) -> Path:
    more.setdefault("say", lambda _: None)
    return run_detect(config, out, parts=parts or PARTS, progress=False, **more)


def trial_in(out: Path, seed: int) -> running.Trial:
    data = load_dataset("digits", image_size=SIZE, limit=200)
    space = Workspace(out, seed, data.fingerprint, "cpu", print)
    return running.Trial(TINY, running.AttackStudy(TINY.study(), data, space))


def bytes_of(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("records/*.json"), *folder.rglob("*.safetensors"), *folder.rglob("*.png")]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in kept if not p.name.endswith("env.json")
    }


def test_every_stage_leaves_a_record_in_the_agreed_form(finished: tuple[Path, Looks]) -> None:
    out, looks = finished
    records = read_records(out / "records")
    expected = {"data"}
    for seed in (0, 1):
        expected |= {f"trigger-badnets-{seed}"}
        for name in ("badnets", "clean"):
            expected |= {f"victim-plain-{name}-{seed}", f"victim-{name}-{seed}"}
            expected |= {f"scan-{d}-{name}-{seed}" for d in ("nc", "reverse")}
        for method in ("fine-tuning", "nc", "reverse"):
            expected |= {f"cleaning-{method}-{s}-badnets-{seed}" for s in ("0.05", "0.2")}
    for method in ("fine-tuning", "nc", "reverse"):
        expected |= {f"rate-{method}-{rate}-badnets-0" for rate in ("0.001", "0.1")}
    expected |= {f"pictures-{d}-badnets-0" for d in ("nc", "reverse")}
    assert set(records) == expected and not list((out / "failures").glob("*"))
    assert len(looks.asked) == 8 and {images for *_, images in looks.asked} == {20}
    bad, clean = records["scan-reverse-badnets-0"].values, records["scan-reverse-clean-0"].values
    assert (bad["true_target"], bad["case"], bad["paper_case"]) == (3, 1, 1)
    assert clean["true_target"] is None and "case" not in clean and len(bad["labels"]) == 10
    assert records["scan-nc-badnets-1"].values["case"] == 3
    victim = records["victim-badnets-0"].values
    assert {"cda", "asr", "ftr"} <= set(victim) and victim["n_clean"] == 50
    # The clean victim is measured without a trigger: its attack success is its false triggers.
    assert records["victim-clean-0"].values["asr"] == records["victim-clean-0"].values["ftr"]


def test_seconds_stand_beside_the_record(finished: tuple[Path, Looks]) -> None:
    beside = json.loads((finished[0] / "records" / "scan-nc-clean-0.env.json").read_text())
    assert beside["seconds"] >= 0


def test_what_is_done_is_not_done_again(tmp_path: Path, looks: Looks) -> None:
    go(TINY, tmp_path, "detection")
    first, asked = bytes_of(tmp_path), len(looks.asked)
    go(TINY, tmp_path, "detection")
    assert bytes_of(tmp_path) == first and len(looks.asked) == asked
    # Another detector and another attack share the victims that are there.
    told: list[str] = []
    go(replace(TINY, detectors=("reverse-lpips",)), tmp_path, "detection", say=told.append)
    assert "victim-plain-badnets-0: done before" in told
    assert [name for name, *_ in looks.asked[asked:]] == ["reverse-lpips"] * 4
    go(replace(TINY, attack="blend", detectors=("nc",)), tmp_path, "detection", say=told.append)
    assert "victim-plain-clean-0: done before" in told and "scan-nc-clean-0: done before" in told
    assert read_detection(tmp_path).attacks() == ["badnets", "blend"]


def test_a_lost_trigger_is_reversed_again(tmp_path: Path, looks: Looks) -> None:
    config = replace(TINY, seeds=(0,), detectors=("reverse",))
    go(config, tmp_path, "detection")
    first = bytes_of(tmp_path)
    (tmp_path / "models" / "reversed-reverse-badnets-0-3.safetensors").unlink()
    go(config, tmp_path, "detection")
    assert bytes_of(tmp_path) == first and len(looks.asked) == 3


def test_cleaning_uses_the_named_labels_and_matches_steps(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[list[int], int, float]] = []

    def repair(settings: Unlearning, model: nn.Module, images: Tensor, *_: Any, **more: Any) -> Any:
        (trigger,) = more["triggers"].values()
        labels = [one.target for one in getattr(trigger, "triggers", ())]
        used.append((labels, len(images), settings.sgd.lr))
        return Repaired(model, {})

    monkeypatch.setattr(Unlearning, "repair", repair)
    records = read_records(go(replace(TINY, seeds=(0,)), tmp_path, "cleaning", "rates"))
    # The label that nc names, which is the wrong one, is what nc's cleaning unlearns.
    assert used[:3] == [([], 10, 1e-3), ([7], 10, 1e-3), ([3], 10, 1e-3)]
    assert used[3:6] == [([], 40, 1e-3), ([7], 40, 1e-3), ([3], 40, 1e-3)]
    assert [(n, lr) for _, n, lr in used[6:]] == [(40, 1e-3)] * 3 + [(40, 1e-1)] * 3
    counts = {r.values["steps"] for name, r in records.items() if name.startswith("cleaning-")}
    assert counts == {1, 3}, "20 and 80 images in batches of 32, a short one included"


def test_a_scan_that_names_nothing_leaves_nothing_to_unlearn(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "planted", lambda model: False)
    records = read_records(go(replace(TINY, seeds=(0,)), tmp_path, "cleaning"))
    values = records["cleaning-reverse-0.05-badnets-0"].values
    assert values["done"] is False and values["why"] == "the scan named no label"
    assert records["cleaning-fine-tuning-0.05-badnets-0"].values["done"] is True
    cleaning = (tmp_path / "tables" / "cleaning.md", write_tables(tmp_path))[0].read_text()
    assert "| 0 of 1 |" in cleaning


def test_reversed_and_planted_triggers_are_compared(finished: tuple[Path, Looks]) -> None:
    out, _ = finished
    values = read_record(out / "records" / "pictures-reverse-badnets-0.json").values
    assert values["n"] == 8 and -1 <= values["cosine"] <= 1 and values["target"] == 3
    assert list(values["labels"]) == sorted(map(str, range(10)), key=str)
    assert len(values["rows"]) == 2
    pictures = {str(p.relative_to(out)) for p in out.glob("pictures/*.png")}
    assert pictures >= set(values["files"]) and len(values["files"]) == 2 * 5 + 10 * 2


def test_closeness_is_that_of_the_triggers_themselves(finished: tuple[Path, Looks]) -> None:
    out, _ = finished
    trial = trial_in(out, 0)
    test = trial.others(TINY.compared)
    values = read_record(out / "records" / "pictures-reverse-badnets-0.json").values

    def near(label: int) -> Closeness:
        given = {"ids": test.ids, "target": TINY.target}
        return compare_triggers(
            trial.reversed("reverse", label), trial.trigger(), test.images, **given
        )

    known = near(TINY.target)
    others = [near(label).cosine for label in range(10) if label != TINY.target]
    assert values["cosine"] == pytest.approx(known.cosine, rel=1e-8)
    assert values["cosine_others"] == pytest.approx(sum(others) / 9, rel=1e-8)
    assert values["psnr_planted"] == pytest.approx(known.psnr_clean, rel=1e-8)
    assert values["psnr_between"] == pytest.approx(known.psnr, rel=1e-8)


def test_several_triggers_take_turns_by_id() -> None:
    class Fill(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, images: Tensor, *, ids: Any = None, target: Any = None) -> Tensor:
            return torch.full_like(images, self.value)

    both = Alternating([Fill(0.25), Fill(0.75)])
    images = torch.zeros(4, 1, 2, 2)
    assert both(images)[:, 0, 0, 0].tolist() == [0.25, 0.75, 0.25, 0.75]
    ids = torch.tensor([1, 1, 2, 4])
    assert both(images, ids=ids)[:, 0, 0, 0].tolist() == [0.75, 0.75, 0.25, 0.25]
    assert images.abs().sum() == 0
    assert bool((Alternating([Fill(0.5)])(images) == 0.5).all())


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        ({"epochs": 10, "batch_size": 32, "trigger_share": 1.0, "append": True}, 600, 380),
        ({"epochs": 1, "batch_size": 32, "trigger_share": 0.2, "append": False}, 33, 1),
        ({"epochs": 2, "batch_size": 32, "trigger_share": 0.2, "append": False}, 34, 4),
        ({"epochs": 1, "batch_size": 32, "trigger_share": 0.5, "append": True}, 2, 1),
    ],
)
def test_steps_are_those_that_unlearning_takes(
    settings: dict[str, Any], images: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Unlearning.preset(**settings).steps(images) == expected


def test_a_failing_detector_stops_nothing_else(tmp_path: Path, looks: Looks) -> None:
    looks.missing = True
    config = replace(TINY, seeds=(0,), detectors=("reverse", "reverse-lpips"))
    records = read_records(go(config, tmp_path, "detection", "pictures"))
    assert "scan-reverse-clean-0" in records and "pictures-reverse-badnets-0" in records
    stage = "scan-reverse-lpips-badnets-0"
    failure = json.loads((tmp_path / "failures" / f"{stage}.json").read_text())
    assert failure["reason"].startswith("LPIPS needs its trained weights")
    after = json.loads(
        (tmp_path / "failures" / "pictures-reverse-lpips-badnets-0.json").read_text()
    )
    assert after["reason"].startswith(f"{stage} failed: LPIPS needs")
    figures = write_figures(tmp_path)
    assert "figure 6, badnets: " in figures.skipped[0] and "LPIPS needs" in figures.skipped[0]
    assert "LPIPS needs" in (tmp_path / "tables", write_tables(tmp_path))[1][0].read_text()
    looks.missing = False
    go(config, tmp_path, "detection", "pictures")
    assert not list((tmp_path / "failures").glob("*"))
    drawn = {path.name for path in write_figures(tmp_path).drawn}
    assert "figure6-badnets.png" in drawn


def test_time_runs_out_between_stages(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(running, "time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    told: list[str] = []
    go(TINY, tmp_path, "detection", minutes=2, say=told.append)
    assert told[-1] == "out of time: the same command goes on from here"
    done = {path.stem for path in tmp_path.glob("records/*.json")}
    assert "scan-reverse-clean-1" not in done and "data" in done
    monkeypatch.setattr(running, "time", time)
    assert set(read_records(go(TINY, tmp_path, "detection"))) >= {"scan-reverse-clean-1"}


def test_training_that_runs_out_of_time_stops_the_run(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise TimeoutError("out of time after epoch 1 of 2")

    monkeypatch.setattr(attack_stages, "train_classifier", late)
    told: list[str] = []
    go(TINY, tmp_path, "detection", minutes=9, say=told.append)
    assert "out of time" in told[-1] and not list((tmp_path / "failures").glob("*"))


def test_an_attack_that_takes_part_in_training(tmp_path: Path, looks: Looks) -> None:
    config = replace(TINY, attack="wanet", seeds=(0,), detectors=("reverse",), target=0)
    records = read_records(go(config, tmp_path, "detection", "pictures"))
    assert (tmp_path / "models" / "trigger-plain-wanet-0.safetensors").is_file()
    assert records["victim-plain-wanet-0"].config["settings"]["mode"] == "per_batch"
    # The stand-in's scan names label 3, which is not the target here.
    assert records["scan-reverse-wanet-0"].values["case"] == 3


def test_the_first_table_comes_first(tmp_path: Path) -> None:
    trials = [trial_in(tmp_path, seed) for seed in (0, 1)]
    names = [job.task.name for job in running._jobs(trials, PARTS)]
    assert len(names) == len(set(names)) and names[0] == "data"
    kinds = [name.partition("-")[0] for name in names]
    last = max(i for i, kind in enumerate(kinds) if kind == "scan")
    first = min(i for i, kind in enumerate(kinds) if kind in ("cleaning", "rate", "pictures"))
    assert last < first


def test_records_are_sorted(finished: tuple[Path, Looks]) -> None:
    out, _ = finished
    found = read_detection(out)
    assert (found.name, found.model, found.width) == ("digits", "resnet10", 8)
    assert Scan("nc", "clean", 1) in found.scans and ("badnets", 0) in found.victims
    assert Cleaning("reverse", 0.05, 1e-3, "badnets", 1) in found.cleanings
    assert Cleaning("nc", 0.2, 0.1, "badnets", 0) in found.rates
    rows = {
        (r["defence"], r["attack"]): r for r in summarise_detection(read_records(out / "records"))
    }
    assert rows["reverse", "badnets"]["named_target"] == 2
    assert rows["nc", "badnets"]["named_target"] == 0 and rows["nc", "badnets"]["named_other"] == 2
    assert rows["reverse", "clean"]["named_other"] == 0
    with pytest.raises(ValueError, match="no scan"):
        summarise_detection({})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attack": "strip"}, "expected attacks out of"),
        ({"detectors": ()}, "expected different detectors"),
        ({"detectors": ("nc", "nc")}, "expected different detectors"),
        ({"detectors": ("strip",)}, "expected different detectors"),
        ({"methods": ("reverse-lpips",)}, "expected different methods"),
        ({"preset": "vast"}, "expected a preset"),
        ({"seeds": ()}, "expected different seeds"),
        ({"seeds": (1, 1)}, "expected different seeds"),
        ({"share": 0.0}, r"expected share in \(0, 1\]"),
        ({"cleaning_shares": (1.5,)}, "expected cleaning_shares"),
        ({"rates": (0.0,)}, "expected learning rates"),
        ({"images": 0}, "expected images >= 1"),
        ({"pictures": 0}, "expected pictures >= 1"),
        ({"target": -1}, "expected a target"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"minutes": 0}, "expected minutes > 0"),
        ({"parts": ("everything",)}, "expected parts out of"),
        ({"parts": ()}, "expected parts out of"),
        ({"device": "tpu"}, "expected device"),
    ],
)
def test_runs_that_are_refused(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run_detect(TINY, tmp_path, progress=False, **more)
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a target label below 10 classes, got 10"):
        run_detect(replace(TINY, target=10), tmp_path, progress=False)


def test_presets() -> None:
    mnist = detect_preset()
    assert mnist.victim == VictimConfig("wanet-mnist", None) and mnist.share == 0.01
    assert mnist.train == TrainConfig.preset("mnist") and mnist.images is None
    cifar10 = detect_preset("cifar10", "vgg16", seeds=(4,))
    assert cifar10.victim == VictimConfig("vgg16", 16) and cifar10.images == 500
    assert cifar10.data.limit == 20_000 and cifar10.seeds == (4,)
    assert detect_preset("gtsrb", width=8, limit=99).data.limit == 99
    assert detect_preset("gtsrb", width=8).victim.width == 8
    with pytest.raises(ValueError, match="expected fields of DetectConfig"):
        detect_preset("mnist", colour="red")


@pytest.mark.slow
def test_a_patch_is_found_and_unlearned_for_real(tmp_path: Path) -> None:
    config = replace(
        TINY,
        data=DataConfig("digits"),  # at the size, and scanned with images, that verdicts hold for
        train=TrainConfig.preset("fast", epochs=6, precision="float32"),
        seeds=(0,),
        detectors=("nc",),
        images=300,
        tested=None,
        cleaning=Unlearning.preset("reverse", epochs=5, lr=1e-2),
        cleaning_shares=(0.2,),
    )
    run_detect(config, tmp_path, parts=("cleaning",), progress=False)
    before = read_record(tmp_path / "records" / "victim-badnets-0.json").values
    assert before["asr"] > 0.9
    assert read_record(tmp_path / "records" / "scan-nc-badnets-0.json").values["case"] in (1, 2)
    after = read_record(tmp_path / "records" / "cleaning-nc-0.2-badnets-0.json").values["after"]
    assert after["asr"] < 0.1 and after["cda"] > before["cda"] - 0.05
