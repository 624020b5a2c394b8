"""Tiny studies from settings to records: what is measured, what is reused, and what may fail.

The victims are trained for seconds, and most scans are stand-ins whose verdict is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_nc import InvertedTrigger, ScanReport, Verdict, judge
from defense_nc.mitigations.unlearning import Unlearning
from defense_nc.protocols import Repaired
from defense_nc.verdict import describe_model
from wm_eval import stages
from wm_eval.config import DataConfig, DefenderConfig, MeasureConfig, Setting, Study, VictimConfig
from wm_eval.config import WatermarkConfig as Mark
from wm_eval.engine import Outcome, Store, run
from wm_eval.local_processes import LocalProcesses
from wm_eval.pages import write_page, write_tables
from wm_eval.pages.report import render_report
from wm_eval.records import Record, StudyRecords, read_study
from wm_eval.study import _with_oracle_label, study_stages
from wm_eval.trial import Trial, images_of
from wm_extract import PAPER_CORRUPTIONS, JointConfig
from wm_inject import PoisonPlan, default_watermark, load_checkpoint, quantize
from wm_victim import TrainConfig, load_classifier, load_dataset, predict

# Sixteen pixels, one epoch, a narrow net: a victim takes about a second.
TINY = Study(
    name="test",
    profile="tiny",
    data=DataConfig(name="digits", image_size=16, limit=200),
    victim=VictimConfig(model="resnet10", width=8),
    train=TrainConfig.preset("fast", epochs=2, precision="float32"),
    attacks=("clean", "badnets"),
    watermark=Mark(
        joint=JointConfig.preset(
            "robust", iterations=2, depth=1, decoder_depth=1, extractor_width=4
        )
    ),
    measure=MeasureConfig(("none", "rotation"), limit=100, stealth=20, watched=50, pictures=2),
)
ATTACKS = replace(
    TINY,
    attacks=("clean", "badnets", "wanet"),
    parts=("rates", "stealth", "tiles"),
    measure=replace(TINY.measure, corrupted=60),
)
MITIGATION = replace(
    TINY,
    detectors={"nc": {"preset": "fast"}},
    mitigations={"fine-tuning": {}, "unlearning-nc": {}},
    defender=DefenderConfig(
        images=40,
        fractions=(0.1, 0.2),
        steps=2,
        clean_victims=True,
        oracle_labels=True,
        rescan=True,
    ),
)


def go(study: Study, out: Path, **rest: Any) -> tuple[Outcome, list[str]]:
    """Run a study: its outcome, and what was said of stages that were not done before."""
    said: list[str] = []
    outcome = run(study_stages(study), out, progress=False, say=said.append, **rest)
    return outcome, [line for line in said if not line.endswith(": done before")]


def all_bytes(folder: Path) -> dict[str, bytes]:
    files = [folder / "records.jsonl", *folder.rglob("*.safetensors"), *folder.rglob("*.png")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a worker: another number of threads rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    with one_thread():
        assert go(ATTACKS, out)[0].complete
    return out


def values(records: StudyRecords, kind: str, **key: Any) -> dict[str, Any]:
    record = records.one(kind, **key)
    assert record is not None, (kind, key)
    return dict(record.values)


def test_every_stage_leaves_a_record(finished: Path) -> None:
    study = read_study(finished)
    assert {kind: len(study.select(kind)) for kind in {r.kind for r in study.records}} == {
        **{"study": 1, "images": 1, "trigger": 2, "victim": 3, "rates": 3},
        **{"stealth": 2, "tiles": 2},
    }
    planned = values(study, "study", study="test")["planned"]
    assert planned["attacks"] == ["clean", "badnets", "wanet"] and planned["seeds"] == [0]
    assert values(study, "images")["n_measured"] == 100
    for attack in ("badnets", "wanet"):
        watched = values(study, "victim", attack=attack)["history"]["watched"]
        assert [set(row) for row in watched] == [{"asr", "cda", "poison_loss"}] * 2
        rates = values(study, "rates", attack=attack)
        counts = {name: row["n_clean"] for name, row in rates["corruptions"].items()}
        assert counts == {"none": 100, "rotation": 60}
        assert set(rates["cda_gap"]) == set(counts)
        gap = rates["cda_gap"]["none"]
        assert gap["low"] <= gap["value"] <= gap["high"]
        stealth = values(study, "stealth", attack=attack)
        assert stealth["n"] == 20 and 10 < stealth["stealth"]["psnr"]["mean"] < 60
        tiles = values(study, "tiles", attack=attack)
        assert [set(row) for row in tiles["tiles"]] == [{"original", "poisoned", "residual"}] * 2
        assert all((finished / file).is_file() for file in tiles["files"])
    clean = values(study, "rates", attack="clean")
    assert "cda_gap" not in clean
    assert clean["corruptions"]["none"]["asr"] == clean["corruptions"]["none"]["ftr"]
    victim = values(study, "victim", attack="clean")
    assert (victim["poisoned"], victim["learned"]) == (0, None)


def test_a_study_that_is_done_is_not_done_again_and_may_grow(finished: Path) -> None:
    before = all_bytes(finished)
    assert go(ATTACKS, finished)[1] == []
    assert all_bytes(finished) == before
    more = replace(ATTACKS, attacks=("badnets", "equation2"), parts=("stealth",), name="other")
    assert go(more, finished)[1] == [
        "study study=other: started",
        "trigger attack=equation2 seed=0: started",
        "stealth attack=equation2 seed=0: started",
    ]


@pytest.mark.slow
def test_two_processes_leave_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    study = replace(ATTACKS, attacks=("clean", "badnets"), parts=("rates",))
    assert go(study, tmp_path, executor=LocalProcesses(2))[0].complete
    here, there = read_study(finished), read_study(tmp_path)
    for record in there.select():
        if record.kind != "study":
            assert here.select(record.kind, **record.key) == [record]


def test_nothing_starts_after_the_deadline_and_the_same_call_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, clock, late = stages._watch, time.monotonic, 0.0

    def slow(*given: Any) -> Any:
        nonlocal late
        late += 3600.0  # an epoch takes an hour
        return watch(*given)

    monkeypatch.setattr(stages, "_watch", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late)
    with one_thread():
        outcome, said = go(ATTACKS, tmp_path, minutes=30)
    victim = "victim attack=clean corruptions=plain seed=0"
    assert f"{victim}: out of time after epoch 1 of 2" in said
    assert not outcome.failures and victim in outcome.late
    assert len(list((tmp_path / "work").iterdir())) >= 1
    monkeypatch.undo()
    with one_thread():
        assert go(ATTACKS, tmp_path)[0].complete
    clean = "models/victim-clean-plain-0.safetensors"
    assert (tmp_path / clean).read_bytes() == (finished / clean).read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_a_search_uses_the_clean_victim_of_the_study(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def fit(*_: Any, clean: Callable[[], nn.Module], **__: Any) -> Any:
        surrogate, victim = clean(), trial.clean.load_victim(store)
        pairs = zip(surrogate.parameters(), victim.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        raise Stop

    trial, store = Trial(ATTACKS, 0, "lf"), Store(finished)
    monkeypatch.setattr(stages, "fit_attack", fit)
    with pytest.raises(Stop):
        stages.fit_trigger(trial, store, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("plan", "poisoned"),
    [
        (PoisonPlan(ratio=0.1, target=0), 20),
        # Batches of 32 carry int(3.2) each, the last one of 8 carries none.
        (PoisonPlan(ratio=0.1, target=0, mode="per_batch"), 6 * 3),
        (None, 0),
    ],
)
def test_exposures_are_counted_as_the_plan_poisons(plan: PoisonPlan | None, poisoned: int) -> None:
    history = {"losses": [1.0] * 3, "watched": [{"asr": r} for r in (0.3, 0.95, 0.8)]}
    counts = stages._exposures(Trial(TINY, 0), plan, history)
    assert (counts["poisoned"], counts["poisoned_of_target"], counts["steps"]) == (
        poisoned,
        None,
        21,
    )
    assert counts["learned"] == {"epoch": 2, "exposures": 2 * poisoned}


def test_a_clean_label_plan_tells_its_share_of_the_target_class() -> None:
    trial = Trial(TINY, 0, "sig")
    labels = trial.data.train.labels
    plan = trial.definition.plan(labels, target=0, ratio=trial.ratio)
    counts = stages._exposures(trial, plan, {"losses": [1.0], "watched": [{"asr": 0.1}]})
    assert counts["poisoned_of_target"] == pytest.approx(0.5, abs=1 / int((labels == 0).sum()))
    assert counts["learned"] is None


def test_images_are_the_first_unless_the_set_is_sorted_by_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, trial, store = images_of(TINY.data), Trial(TINY, 0), Store(tmp_path)
    assert torch.equal(trial.test_images(store, 50).ids, data.test.ids[:50])
    by_class = replace(data, test=data.test.subset(data.test.labels.argsort(stable=True)))
    monkeypatch.setattr("wm_eval.trial.images_of", lambda config: by_class)
    chosen = trial.test_images(store, 100)
    assert (torch.bincount(chosen.labels, minlength=10) >= 9).all() and len(chosen) == 100
    assert len(trial.test_images(store)) == len(data.test)


def test_the_corrupted_victims_train_under_the_papers_operations() -> None:
    assert Trial(TINY, 0).train_corruptions is None
    corrupt = Trial(TINY, 0, corruptions="corrupted").train_corruptions
    assert corrupt is not None and corrupt.probability == 0.3
    assert list(corrupt.operations) == [c for n, c in PAPER_CORRUPTIONS.items() if n != "none"]


def test_steps_are_counted_in_passes() -> None:
    defender = DefenderConfig(fractions=(0.1,), passes=10)
    trial = Trial(replace(TINY, defender=defender), 0)
    assert trial.steps(0.1) == 10 * 2  # 20 images and as many copies, in batches of 32
    assert Trial(replace(TINY, defender=DefenderConfig(steps=7)), 0).steps(0.1) == 7


def test_an_attack_may_have_a_training_of_its_own() -> None:
    study = replace(TINY, attack_train={"badnets": {"epochs": 7, "batch_size": 100}})
    clean, badnets = Trial(study, 3), Trial(study, 3, "badnets")
    assert clean.train_config() == replace(TINY.train, seed=3)
    assert badnets.train_config() == replace(TINY.train, seed=3, epochs=7, batch_size=100)
    assert badnets.training == {**clean.training, "train": badnets.training["train"]}
    assert stages._exposures(badnets, None, {"losses": [1.0] * 7, "watched": []})["steps"] == 7 * 2


def planned(study: Study) -> list[str]:
    return list(dict.fromkeys(stage.id for stage in study_stages(study)))


def test_an_adaptive_attacker_trains_a_victim_whose_last_layer_is_fixed(tmp_path: Path) -> None:
    study = replace(TINY, attacks=("badnets-adaptive",), parts=("rates",))
    assert go(study, tmp_path)[0].complete
    victim = read_study(tmp_path).one("victim", attack="badnets-adaptive")
    assert victim is not None and victim.values["poisoned"] == 20
    assert victim.settings["adaptation"]["share"] == 0.5
    (file,) = victim.values["files"]
    rows = load_classifier(tmp_path / file).head.weight
    torch.testing.assert_close(rows @ rows.T, 2.25 * torch.eye(10))


def test_parts_ask_only_for_what_they_need() -> None:
    study = replace(
        TINY,
        attacks=("badnets", "lf", "input-aware"),
        corruptions=("corrupted",),
        parts=("stealth",),
    )
    assert planned(study)[2:] == [
        "trigger attack=badnets seed=0",
        "stealth attack=badnets seed=0",
        "victim attack=clean corruptions=plain seed=0",  # LF searches on it
        "trigger attack=lf seed=0",
        "stealth attack=lf seed=0",
        "trigger attack=input-aware seed=0",
        "victim attack=input-aware corruptions=corrupted seed=0",  # which finishes its trigger
        "stealth attack=input-aware seed=0",
    ]
    both = planned(replace(TINY, corruptions=("plain", "corrupted")))
    assert both.index("rates attack=badnets corruptions=plain seed=0") < both.index(
        "victim attack=clean corruptions=corrupted seed=0"
    )


def test_learning_rates_are_tried_with_the_first_seed_and_the_largest_fraction() -> None:
    ids = planned(replace(MITIGATION, seeds=(0, 1), learning_rates=(0.01, 0.1)))
    tried = [name for name in ids if " lr=" in name]
    assert len(tried) == 4 and all("fraction=0.2 " in name and "seed=0" in name for name in tried)


def test_a_population_gives_every_seed_a_target_of_its_own() -> None:
    setting = Setting(
        TINY.data,
        TINY.victim,
        TINY.train,
        triggers={"badnets": {"ratio": 0.3}},
        calibration={"clean": 1},
        test={"badnets": 2, "lf": 1},
    )
    study = replace(TINY, attacks=(), settings={"a": setting}, detectors={"nc": {}})
    known = {stage.id: stage for stage in study_stages(study)}
    where = "setting=a split=test"
    victim = known[f"victim attack=badnets corruptions=plain seed=1001 {where}"]
    assert (victim.settings["target"], victim.settings["ratio"]) == (1, 0.3)
    assert f"scan attack=lf corruptions=plain detector=nc seed=1000 {where}" in known
    assert f"victim attack=clean corruptions=plain seed=1000 {where}" in known
    assert known["study study=test"].work(Store(Path()), Path()).values["planned"]["settings"] == {
        "a": {"calibration": {"clean": 1}, "test": {"badnets": 2, "lf": 1}}
    }


def test_a_setting_may_leave_detectors_out() -> None:
    setting = Setting(TINY.data, TINY.victim, TINY.train, unseen={"clean": 1})
    settings = {"a": setting, "b": replace(setting, detectors=("uap",))}
    study = replace(TINY, attacks=(), settings=settings, detectors={"nc": {}, "uap": {}})
    scans = [name for name in planned(study) if name.startswith("scan ")]
    assert [("uap" in name, "setting=b" in name) for name in scans] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    scans = [name for name in planned(replace(study, detectors={"nc": {}})) if "scan " in name]
    assert len(scans) == 1 and "setting=a" in scans[0]
    with pytest.raises(ValueError, match="detectors of a setting"):
        replace(study, settings={"b": replace(setting, detectors=("none",))})


def test_a_target_that_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="10 classes"):
        planned(replace(TINY, target=10))


class Scans:
    """Stands in for every detector: names the given labels, one verdict after the other."""

    inverts = True

    def __init__(self, *names: tuple[int, ...]) -> None:
        self.names, self.count = list(names), 0

    def __call__(
        self, trial: Trial, detector: str, model: nn.Module, store: Store, checkpoint: Path
    ) -> ScanReport:
        images: Tensor = trial.defender_images(store).images
        named = self.names[self.count] if self.count < len(self.names) else ()
        self.count += 1
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
    def use(*names: tuple[int, ...]) -> Scans:
        scans = Scans(*names)
        monkeypatch.setattr(stages, "_scan", scans)
        return scans

    return use


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("victims")
    assert go(TINY, out)[0].complete
    return out


@pytest.fixture
def out(victims: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(victims, tmp_path / "out"))


def test_a_true_label_without_a_reversed_trigger_is_not_unlearned() -> None:
    warps = {"detectors": {"warp": {}}, "mitigations": {"unlearning-warp": {}}}
    trial = Trial(replace(MITIGATION, **warps), seed=0, attack="badnets")  # type: ignore[arg-type]

    def stages(*files: str) -> int:
        values = {"oracle_label": 0, "named": [], "files": dict.fromkeys(files, "")}
        scan = Record("scan", {}, {}, {}, "", values, {})
        return len([*_with_oracle_label(trial, "warp", scan)])

    assert stages() == stages(trial.reversed_file("warp", 1)) == 0
    assert stages(trial.reversed_file("warp", 0)) == 2  # fractions


def test_unlearning_what_an_audit_names(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label 4 by what warps reverse, who are surer; label 7, of which nothing is, is left."""
    lowest = {"uap": {4: 20.0}, "warp": {4: 0.1}, "sweep": {7: 1.0}, "head": {}}

    def scan(
        trial: Trial, detector: str, model: nn.Module, store: Store, checkpoint: Path
    ) -> ScanReport:
        scores = torch.linspace(50.0, 51.0, 10)
        for label, score in lowest[detector].items():
            scores[label] = score
        shade = {"uap": 0.2, "warp": 0.3}.get(detector)
        pattern = torch.full(trial.defender_images(store).images.shape[1:], shade or 0.0)
        trigger = InvertedTrigger(torch.ones_like(pattern[:1]), pattern, target=4)
        triggers = {4: trigger} if shade else {}
        subject = describe_model(model, trial.defender_images(store).images, classes=10)
        settings = {"floor": 0.9, "triggers": triggers, "subject": subject}
        return judge(f"fake {detector}", scores, torch.ones(10), **settings)

    seen: list[dict[int, nn.Module]] = []

    def repair(self: Unlearning, model: nn.Module, *data: Tensor, **rest: Any) -> Repaired:
        seen.append(rest["triggers"])
        return Repaired(model, {"steps": 0})

    monkeypatch.setattr(stages, "_scan", scan)
    monkeypatch.setattr(Unlearning, "repair", repair)
    study = replace(
        MITIGATION,
        detectors={name: {} for name in ("uap", "head", "sweep", "warp")},
        mitigations={"unlearning-audit": {}},
        defender=DefenderConfig(images=40, fractions=(0.1,), steps=2),
    )
    assert go(study, out)[0].complete
    record = values(read_study(out), "mitigation", attack="badnets")
    assert record["labels"] == [4] and record["why"].startswith("the audit named 4, 7; no detector")
    (triggers,) = seen
    assert triggers.keys() == {4} and float(triggers[4].pattern.max()) == pytest.approx(0.3)
    lowest["uap"], lowest["warp"], lowest["sweep"] = {}, {}, {}
    assert go(replace(study, seeds=(1,)), out)[0].complete
    record = values(read_study(out), "mitigation", attack="badnets", seed=1)
    assert not record["done"] and record["why"] == "the audit named no label (clean)"


def test_mitigation_of_a_backdoored_and_a_clean_victim(
    out: Path, scans: Callable[..., Scans]
) -> None:
    before = {n: b for n, b in all_bytes(out).items() if n.startswith("models")}
    # The clean victim, the backdoored one, and what unlearning has left of it, twice.
    scans((), (0,), (), (4,))
    outcome, said = go(MITIGATION, out)
    assert outcome.complete and not any("victim" in line for line in said)
    after = all_bytes(out)
    assert {name: after[name] for name in before} == before
    study = read_study(out)
    assert len(study.select("mitigation", attack="badnets", oracle_label=False)) == 4
    assert not study.select("mitigation", attack="badnets", oracle_label=True)
    assert len(study.select("mitigation", attack="clean", oracle_label=True)) == 2
    assert {record.key["fraction"] for record in study.select("rescan")} == {0.1, 0.2}
    tuned = values(study, "mitigation", attack="badnets", method="fine-tuning", fraction=0.2)
    assert (tuned["n_images"], tuned["steps"], tuned["labels"], tuned["done"]) == (40, 2, [], True)
    low, high = tuned["der_interval"]
    assert low <= tuned["der"] <= high and tuned["after"]["n_attack"] > 80
    key = {"attack": "badnets", "method": "unlearning-nc"}
    unlearned = values(study, "mitigation", fraction=0.1, **key)
    assert (unlearned["n_images"], unlearned["labels"]) == (20, [0])
    first, second = (values(study, "rescan", fraction=f, **key) for f in (0.1, 0.2))
    assert first["agrees"] and first["named_before"] == [0] and first["named"] == []
    assert not second["agrees"] and second["named"] == [4] and second["verdict"] == "backdoored"
    clean = {"attack": "clean", "method": "unlearning-nc", "fraction": 0.1}
    left = values(study, "mitigation", oracle_label=False, **clean)
    assert not left["done"] and left["after"] == left["before"] and left["der"] is None
    oracle = values(study, "mitigation", oracle_label=True, **clean)
    assert oracle["done"] and oracle["labels"] == [0]  # 0 has the smallest score
    assert oracle["asr_change"] is None
    # What a record says can be measured again from the files.
    repaired = load_classifier(
        out / "models" / "repaired-badnets-plain-0.1-unlearning-nc-false-0.safetensors"
    )
    test = load_dataset("digits", image_size=16, limit=200).test
    answers = predict(repaired, test.images[:100]).argmax(1)
    share = float((answers == test.labels[:100]).double().mean())
    assert unlearned["after"]["cda"] == pytest.approx(share)
    rows = load_checkpoint(out / "models" / "outcomes-badnets-plain-0.safetensors", kind="outcomes")
    assert {len(column) for column in rows.state.values()} == {100}


def test_reactivation_trains_what_was_repaired_and_the_clean_victim(out: Path) -> None:
    defender = DefenderConfig(images=40, fractions=(0.2,), steps=2, reactivation=(1, 5))
    study = replace(
        TINY, attacks=("badnets",), mitigations={"fine-tuning": {}, "clp": {}}, defender=defender
    )
    outcome, _ = go(study, out)
    assert outcome.complete
    for method in ("fine-tuning", "clp", "clean-victim"):
        again = values(read_study(out), "reactivation", method=method, attack="badnets")
        assert (again["n_images"], again["steps"]) == (40, 2)
        assert [row["poisoned"] for row in again["rows"]] == [1, 5]
        assert all(row["n_attack"] > 80 for row in again["rows"])
    many = replace(study, defender=replace(defender, reactivation=(1, 500)))
    outcome, _ = go(many, out)
    reasons = {failure.reason for failure in outcome.failures.values()}
    assert len(reasons) == 1 and "images, got 500" in reasons.pop()


def test_poisoned_images_to_train_with_are_the_attackers(out: Path) -> None:
    trial = Trial(replace(TINY, attacks=("badnets",)), seed=0, attack="badnets")
    go(trial.study, out)
    images, labels = stages._poisoned(trial, Store(out, "cpu"), 5)
    train = trial.data.train
    changed = (images[:, None] != quantize(train.images)[None]).flatten(2).sum(2)
    least, source = changed.min(1)
    assert labels.tolist() == [0] * 5 and len(set(source.tolist())) == 5
    assert bool((least <= 4).all()), "a patch of two by two pixels"
    assert bool((train.labels[source] != 0).all())


@pytest.mark.parametrize("named", [(), (3,), (0, 3)])
def test_the_oracle_label_is_used_where_the_scan_was_wrong(
    out: Path, scans: Callable[..., Scans], named: tuple[int, ...]
) -> None:
    scans(named)
    defender = replace(MITIGATION.defender, fractions=(0.1,), rescan=False)
    go(replace(MITIGATION, attacks=("badnets",), defender=defender), out)
    study = read_study(out)
    told = values(study, "mitigation", method="unlearning-nc", oracle_label=False)
    assert told["labels"] == list(named) and told["done"] == bool(named)
    oracle = study.one("mitigation", method="unlearning-nc", oracle_label=True)
    assert (oracle is None) == (0 in named)
    assert oracle is None or oracle.values["labels"] == [0]


def test_a_failure_says_why_and_the_others_go_on(
    out: Path, scans: Callable[..., Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    defender = replace(MITIGATION.defender, fractions=(0.1,))
    study = replace(MITIGATION, attacks=("badnets",), defender=defender)

    def refuse(*_: Any) -> Any:
        raise ValueError("no such images")

    monkeypatch.setattr(stages, "_scan", refuse)
    outcome, _ = go(study, out)
    reasons = {failure.kind: failure.reason for failure in outcome.failures.values()}
    scan = "scan attack=badnets corruptions=plain detector=nc seed=0"
    assert reasons == {
        "scan": "no such images",
        "mitigation": f"{scan} failed: no such images",
    }
    assert read_study(out).select("mitigation", method="fine-tuning")
    scans((0,))
    outcome, said = go(study, out)  # what is there to scan again is known when it has succeeded
    assert outcome.complete and [line.split()[0] for line in said] == [
        "scan",
        "mitigation",
        "rescan",
    ]


@pytest.mark.integration
def test_the_whole_story(tmp_path: Path) -> None:
    """Every part, with real scans that are cut short."""
    study = replace(
        TINY,
        attacks=("clean", "watermark"),
        parts=(
            *("rates", "baseline", "stealth", "tiles", "mark", "reversed", "closeness", "exports"),
        ),
        data=DataConfig("digits", limit=100),
        train=replace(TINY.train, epochs=1),
        measure=replace(TINY.measure, corruptions=("none",), compared=20),
        detectors={"nc": {"preset": "fast", "steps": 2}},
        mitigations={"control-nc": {"preset": "nc"}, "unlearning-nc": {"preset": "nc"}},
        defender=DefenderConfig(images=20, fractions=(0.2,), steps=1),
    )
    outcome, _ = go(study, tmp_path)
    assert outcome.complete, outcome.failures
    assert write_tables(tmp_path) and write_page(tmp_path) and render_report(tmp_path)
    records = read_study(tmp_path)
    baseline = values(records, "rates", trigger="watermark")
    assert baseline["label_map"] == "all-to-one" and "cda_gap" not in baseline
    tiles = values(records, "tiles", attack="watermark")
    assert set(tiles["tiles"][0]) >= {"extracted", "extracted-clean"} and "watermark" in tiles
    assert values(records, "mark")["detection"]["n"] == 50
    assert len(values(records, "reversed", attack="clean")["pictures"]) == 10
    assert values(records, "closeness")["n"] == 20
    exports = values(records, "exports")
    assert set(exports["models"]) == {"injector", "extractor", "classifier"}
    assert "generator" in exports["absent"]
    assert torch.equal(
        Trial(study, 0, "watermark").load_trigger(Store(tmp_path)).watermark, default_watermark(32)
    )
