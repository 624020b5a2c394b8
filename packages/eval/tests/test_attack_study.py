"""A study of attacks: what it measures, that it goes on where it stopped, and what may fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wm_eval.attacks import run, stages, study
from wm_eval.attacks.config import TABLE, AttackStudyConfig
from wm_eval.attacks.planting import MarkAttack, Planting, table_attack
from wm_eval.attacks.profiles import DATA, attack_profile
from wm_eval.attacks.run import run_attack_study
from wm_eval.attacks.study import AttackStudy
from wm_eval.config import DataConfig, MeasureConfig, VictimConfig
from wm_eval.records import read_record, read_records
from wm_eval.workspace import Workspace
from wm_extract import PAPER_CORRUPTIONS, JointConfig
from wm_inject import BlendTrigger, PoisonPlan, default_watermark, load_trigger
from wm_inject.attacks import PROFILES, FitContext, Fitted
from wm_victim import Dataset, TrainConfig, load_dataset

# Sixteen pixels, two epochs, a narrow net: a victim takes about a second.
TINY = AttackStudyConfig(
    name="test",
    profile="tiny",
    data=DataConfig(name="digits", image_size=16, limit=300),
    victim=VictimConfig(model="resnet10", width=8),
    train=TrainConfig.preset("fast", epochs=2, precision="float32"),
    attacks=("badnets", "wanet"),
    joint=JointConfig.preset("robust", iterations=2, depth=1, decoder_depth=1, extractor_width=4),
    measure=MeasureConfig(corruptions=("none", "rotation"), limit=100, pictures=2),
    stealth_images=20,
    watched_images=50,
)


class Fading:
    """A hook that trains its trigger: the blended picture fades with every batch."""

    def __init__(self, trigger: BlendTrigger) -> None:
        self.trigger, self.batches = trigger, 0

    def transform(
        self, images: Tensor, labels: Tensor, *, model: Any, generator: Any
    ) -> tuple[Tensor, Tensor]:
        self.trigger.picture.mul_(0.99)
        self.batches += 1
        return self.trigger(images), torch.zeros_like(labels)

    def state_dict(self) -> dict[str, Any]:
        return {"picture": self.trigger.picture.clone(), "batches": self.batches}

    def load_state_dict(self, state: Any, /) -> None:
        self.trigger.picture.copy_(state["picture"])
        self.batches = state["batches"]


class FadingAttack(MarkAttack):
    """An attack that is finished by the training of the victim."""

    def hook(self, trigger: Any, plan: Any, *, num_classes: int, length: Any = None) -> Any:
        return Fading(trigger)


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, attack: Any) -> None:
    """Let ``attack`` stand in for the attack ``name``."""

    def lookup(wanted: str, config: AttackStudyConfig) -> Any:
        return attack if wanted == name else table_attack(wanted, config)

    monkeypatch.setattr(study, "table_attack", lookup)


def all_bytes(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("records/*.json"), *folder.rglob("*.safetensors"), *folder.rglob("*.png")]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in kept if not p.name.endswith("env.json")
    }


def one_seed(config: AttackStudyConfig, folder: Path, data: Dataset | None = None) -> AttackStudy:
    data = data or load_dataset("digits", image_size=16, limit=300)
    return AttackStudy(config, data, Workspace(folder, 0, data.fingerprint, "cpu", print))


def planned(config: AttackStudyConfig, folder: Path, *parts: str) -> list[str]:
    return [task.name for task in run._tasks(one_seed(config, folder), parts or run.PARTS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    run_attack_study(TINY, out, progress=False)
    return out


def test_every_stage_leaves_a_record_in_the_agreed_form(finished: Path) -> None:
    records = read_records(finished / "records")
    expected = {"data", "victim-plain-clean-0", "cell-plain-clean-0"}
    for name in ("badnets", "wanet"):
        expected |= {f"{kind}-{name}-0" for kind in ("trigger", "stealth", "figure")}
        expected |= {f"{kind}-plain-{name}-0" for kind in ("victim", "cell")}
    assert set(records) == expected and not list((finished / "failures").glob("*"))
    assert records["data"].values["planned"]["attacks"] == ["badnets", "wanet"]
    assert records["data"].values["n_measured"] == 100
    for name in ("badnets", "wanet"):
        victim = records[f"victim-plain-{name}-0"].values
        assert (victim["attack"], victim["recipe"]) == (name, "plain")
        assert [set(seen) for seen in victim["history"]["watched"]] == [
            {"asr", "cda", "poison_loss"}
        ] * 2
        cell = records[f"cell-plain-{name}-0"].values
        assert set(cell["corruptions"]) == {"none", "rotation"}
        assert {"cda", "asr", "ftr", "n_clean", "n_attack"} <= set(cell["corruptions"]["none"])
        assert cell["cda_gap"]["low"] <= cell["cda_gap"]["value"] <= cell["cda_gap"]["high"]
        stealth = records[f"stealth-{name}-0"].values
        assert stealth["n"] == 20 and 10 < stealth["stealth"]["psnr"]["mean"] < 60
        figure = records[f"figure-{name}-0"].values
        assert [set(row) for row in figure["tiles"]] == [{"original", "poisoned", "residual"}] * 2
        assert all((finished / file).is_file() for file in figure["files"])


def test_the_clean_victim_is_what_the_others_are_compared_with(finished: Path) -> None:
    cell = read_record(finished / "records" / "cell-plain-clean-0.json").values
    assert cell["cda_gap"]["value"] == 0
    assert cell["corruptions"]["none"]["asr"] == cell["corruptions"]["none"]["ftr"]
    victim = read_record(finished / "records" / "victim-plain-clean-0.json").values
    assert (victim["poisoned"], victim["learned"]) == (0, None)
    assert [set(seen) for seen in victim["history"]["watched"]] == [{"cda"}] * 2


def test_a_study_that_is_done_is_not_done_again(finished: Path) -> None:
    before, said = all_bytes(finished), list[str]()
    run_attack_study(TINY, finished, progress=False, say=said.append)
    assert all(line.endswith(": done before") for line in said) and len(said) == 13
    assert all_bytes(finished) == before


def test_more_attacks_reuse_what_is_there(finished: Path) -> None:
    said: list[str] = []
    more = replace(TINY, attacks=("badnets", "wanet", "equation2"))
    run_attack_study(more, finished, parts=("stealth",), progress=False, say=said.append)
    started = [line for line in said if line.endswith(": started")]
    assert started == [f"{n}: started" for n in ("data", "trigger-equation2-0")] + [
        "stealth-equation2-0: started"
    ]
    run_attack_study(TINY, finished, progress=False)  # leave it as it was


def test_a_killed_study_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = stages._watch
    for kill in ("badnets", "wanet"):

        def dying(planting: Planting, *rest: Any, kill: str = kill) -> Any:
            if getattr(planting.now(), "kind", None) == kill and rest[2] == 2:
                raise KeyboardInterrupt
            return watch(planting, *rest)

        monkeypatch.setattr(stages, "_watch", dying)
        with pytest.raises(KeyboardInterrupt):
            run_attack_study(TINY, tmp_path, progress=False)
    monkeypatch.setattr(stages, "_watch", watch)
    assert len(list((tmp_path / "work").glob("victim-plain-wanet-0-*.safetensors"))) == 1
    run_attack_study(TINY, tmp_path, progress=False)
    names = {n: b for n, b in all_bytes(finished).items() if "equation2" not in n}
    assert all_bytes(tmp_path) == names
    assert not list((tmp_path / "work").iterdir())


def test_a_hook_hands_over_the_trigger_it_trained_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fading = FadingAttack("equation2", weight=0.2, mode="per_batch")
    pretend(monkeypatch, "equation2", fading)
    config = replace(TINY, attacks=("equation2",))
    run_attack_study(config, tmp_path / "whole", parts=("cells",), progress=False)
    whole = tmp_path / "whole" / "models"
    fitted, left = (
        load_trigger(whole / f"trigger-{name}.safetensors").picture
        for name in ("equation2-0", "plain-equation2-0")
    )
    assert torch.allclose(left, fitted * 0.99**20, atol=1e-6)  # 2 epochs of 10 batches
    watch = stages._watch
    calls = []

    def dying(planting: Planting, *rest: Any) -> Any:
        calls.append(rest[2])
        if calls == [1, 2, 1, 2]:  # the clean victim's two epochs, then the attacked one's
            raise KeyboardInterrupt
        return watch(planting, *rest)

    monkeypatch.setattr(stages, "_watch", dying)
    with pytest.raises(KeyboardInterrupt):
        run_attack_study(config, tmp_path / "killed", parts=("cells",), progress=False)
    run_attack_study(config, tmp_path / "killed", parts=("cells",), progress=False)
    assert calls == [1, 2, 1, 2, 2]
    assert all_bytes(tmp_path / "killed") == all_bytes(tmp_path / "whole")


def test_what_an_attacker_trains_on(finished: Path, tmp_path: Path) -> None:
    one = one_seed(TINY, finished)
    surrogate = stages._co_train(one, tmp_path / "a.safetensors", None)
    clean = one.victim("plain", "clean").state_dict()
    assert all(torch.equal(t, clean[name]) for name, t in surrogate.state_dict().items())
    size = one.data.image_size
    hook = Fading(BlendTrigger(image_size=size, channels=1))
    own = stages._co_train(one, tmp_path / "b.safetensors", hook)
    assert hook.batches == 20 and (tmp_path / "b.safetensors").is_file()
    assert not torch.equal(own.state_dict()["head.weight"], clean["head.weight"])
    late = replace(one, deadline=time.monotonic() - 1)
    with pytest.raises(TimeoutError, match="out of time"):
        stages._co_train(late, tmp_path / "c.safetensors", hook)


class Refusing(MarkAttack):
    """An attack whose trigger cannot be made."""

    def fit(self, context: FitContext) -> Fitted:
        raise ValueError("expected luck,\n  got none")


def test_an_attack_that_fails_says_why_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, attacks=("badnets", "equation2"))
    pretend(monkeypatch, "equation2", Refusing("equation2", weight=0.2))
    said: list[str] = []
    run_attack_study(config, tmp_path, progress=False, say=said.append)
    assert (tmp_path / "records" / "cell-plain-badnets-0.json").is_file()
    failures = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "failures").glob("*.json")}
    assert set(failures) == {
        "trigger-equation2-0",
        "stealth-equation2-0",
        "figure-equation2-0",
        "victim-plain-equation2-0",
        "cell-plain-equation2-0",
    }
    assert failures["trigger-equation2-0"] == {
        "stage": "trigger-equation2-0",
        "attack": "equation2",
        "recipe": None,
        "seed": 0,
        "reason": "expected luck, got none",
    }
    cell = failures["cell-plain-equation2-0"]
    assert cell["recipe"] == "plain"
    assert cell["reason"] == "trigger-equation2-0 failed: expected luck, got none"
    assert "trigger-equation2-0: failed: expected luck, got none" in said
    monkeypatch.undo()
    run_attack_study(config, tmp_path, progress=False)
    assert not list((tmp_path / "failures").glob("*"))
    assert (tmp_path / "records" / "cell-plain-equation2-0.json").is_file()


def test_a_clean_victim_that_fails_leaves_a_reason_for_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*given: Any, **settings: Any) -> Any:
        raise RuntimeError("the loss became nan in epoch 1")

    monkeypatch.setattr(stages, "train_classifier", diverge)
    run_attack_study(TINY, tmp_path, parts=("cells",), progress=False)
    for name in ("clean", "badnets", "wanet"):
        kept = json.loads((tmp_path / "failures" / f"cell-plain-{name}-0.json").read_text())
        assert "the loss became nan" in kept["reason"]


def test_nothing_starts_after_the_deadline_and_the_same_call_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    watch, clock = stages._watch, time.monotonic
    late = 0.0

    def slow(planting: Planting, *rest: Any) -> Any:
        nonlocal late
        late += 3600.0  # an epoch takes an hour
        return watch(planting, *rest)

    monkeypatch.setattr(stages, "_watch", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late)
    run_attack_study(TINY, tmp_path, minutes=30, parts=("cells",), say=said.append)
    assert said[-2:] == [
        "victim-plain-clean-0: out of time after epoch 1 of 2",
        "out of time: the same command goes on from here",
    ]
    assert not list((tmp_path / "failures").glob("*"))
    said.clear()
    run_attack_study(TINY, tmp_path, minutes=90, parts=("cells",), say=said.append)
    assert "victim-plain-clean-0: started" in said and "cell-plain-clean-0: started" in said
    assert said[-1] == "out of time: the same command goes on from here"
    monkeypatch.undo()
    run_attack_study(TINY, tmp_path, progress=False)
    assert all_bytes(tmp_path) == {
        n: b for n, b in all_bytes(finished).items() if "equation2" not in n
    }


@pytest.mark.parametrize(
    ("plan", "poisoned", "of_target"),
    [
        (PoisonPlan(ratio=0.1, target=0), 30, None),
        # Batches of 32 carry int(3.2) each, the last one of 12 carries one.
        (PoisonPlan(ratio=0.1, target=0, mode="per_batch"), 9 * 3 + 1, None),
        (None, 0, None),
    ],
)
def test_exposures_are_counted_as_the_plan_poisons(
    plan: PoisonPlan | None, poisoned: int, of_target: float | None, tmp_path: Path
) -> None:
    history = {"losses": [1.0] * 3, "watched": [{"asr": r} for r in (0.3, 0.95, 0.8)]}
    found = stages._exposures(one_seed(TINY, tmp_path), plan, history)
    assert (found["poisoned"], found["poisoned_of_target"]) == (poisoned, of_target)
    assert found["steps"] == 30
    assert found["learned"] == {"epoch": 2, "exposures": 2 * poisoned}


def test_a_clean_label_plan_tells_its_share_of_the_target_class(tmp_path: Path) -> None:
    one = one_seed(TINY, tmp_path)
    labels = one.data.train.labels
    plan = table_attack("sig", TINY).plan(labels, target=0)
    found = stages._exposures(one, plan, {"losses": [1.0], "watched": [{"asr": 0.1}]})
    count = int((labels == 0).sum())
    assert found["poisoned"] == round(count / 2)
    assert found["poisoned_of_target"] == pytest.approx(0.5, abs=1 / count)
    assert found["learned"] is None


def test_equation_2_blends_the_same_picture(tmp_path: Path) -> None:
    train = load_dataset("digits", image_size=16, limit=20).train
    context = FitContext(train.images, train.labels, 10, 0, 0, lambda hook: torch.nn.Identity())
    trigger = table_attack("equation2", TINY).fit(context).trigger
    expected = 0.8 * train.images + 0.2 * default_watermark(16)
    assert torch.allclose(trigger(train.images), expected, atol=1e-6)
    mark = table_attack("watermark", TINY).fit(replace(context, progress=False))
    assert torch.equal(mark.trigger.watermark, default_watermark(16))
    assert len(mark.facts["history"]) >= 1


def test_images_are_the_first_unless_the_set_is_sorted_by_class(tmp_path: Path) -> None:
    data = load_dataset("digits", image_size=16)
    mixed = one_seed(TINY, tmp_path, data)
    assert torch.equal(mixed.test(50).ids, data.test.ids[:50])
    by_class = replace(data, test=data.test.subset(data.test.labels.argsort(stable=True)))
    chosen = one_seed(TINY, tmp_path, by_class).test(100)
    assert (torch.bincount(chosen.labels, minlength=10) >= 9).all() and len(chosen) == 100
    assert len(one_seed(TINY, tmp_path, by_class).test(None)) == len(data.test)


def test_the_corrupted_recipe_trains_under_the_papers_operations(tmp_path: Path) -> None:
    one = one_seed(TINY, tmp_path)
    assert one.corrupt("plain") is None
    corrupt = one.corrupt("corrupted")
    assert corrupt is not None and corrupt.probability == 0.3
    assert list(corrupt.operations) == [c for n, c in PAPER_CORRUPTIONS.items() if n != "none"]


def test_parts_ask_only_for_what_they_need(tmp_path: Path) -> None:
    config = replace(TINY, attacks=("badnets", "lf", "input-aware"), recipes=("corrupted",))
    assert planned(config, tmp_path, "stealth") == [
        "data",
        "trigger-badnets-0",
        "stealth-badnets-0",
        "victim-plain-clean-0",  # LF searches on it
        "trigger-lf-0",
        "stealth-lf-0",
        "trigger-input-aware-0",
        "victim-corrupted-input-aware-0",  # only a victim's training finishes its trigger
        "stealth-input-aware-0",
    ]
    everything = planned(config, tmp_path)
    assert len(everything) == len(set(everything))
    assert set(planned(config, tmp_path, "figure")) < set(everything)


def test_all_of_the_first_recipe_comes_before_the_second(tmp_path: Path) -> None:
    names = planned(replace(TINY, recipes=("plain", "corrupted")), tmp_path, "cells")
    assert names.index("cell-plain-wanet-0") < names.index("victim-corrupted-clean-0")


def test_the_clean_victim_alone_under_corruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = stages.train_classifier

    def spy(*given: Any, corrupt: Any, **settings: Any) -> Any:
        trained.append(corrupt)
        return train(*given, corrupt=corrupt, **settings)

    monkeypatch.setattr(stages, "train_classifier", spy)
    config = replace(TINY, attacks=("clean",), recipes=("corrupted",))
    run_attack_study(config, tmp_path, progress=False)
    assert [corrupt.probability for corrupt in trained] == [0.3]
    names = {"data", "victim-corrupted-clean-0", "cell-corrupted-clean-0"}
    assert set(read_records(tmp_path / "records")) == names


def test_each_seed_has_its_own_victims(tmp_path: Path) -> None:
    config = replace(TINY, attacks=("clean",), seeds=(0, 4), train=replace(TINY.train, epochs=1))
    run_attack_study(config, tmp_path, parts=("cells",), progress=False)
    first, other = (tmp_path / "models" / f"victim-plain-clean-{k}.safetensors" for k in (0, 4))
    assert first.read_bytes() != other.read_bytes()
    assert read_record(tmp_path / "records" / "data.json").values["planned"]["seeds"] == [0, 4]


@pytest.mark.slow
def test_a_backdoor_is_learned_on_real_digits(tmp_path: Path) -> None:
    config = attack_profile("tiny", "digits", attacks=("badnets",))
    records = read_records(run_attack_study(config, tmp_path, parts=("cells",), progress=False))
    victim = records["victim-plain-badnets-0"].values
    assert victim["learned"]["exposures"] == victim["learned"]["epoch"] * 120
    cell = records["cell-plain-badnets-0"].values
    none = cell["corruptions"]["none"]
    assert none["asr"] > 0.9 and none["ftr"] < 0.05 and abs(cell["cda_gap"]["value"]) < 0.05


def test_settings_that_do_not_matter_do_not_move_a_stage(tmp_path: Path) -> None:
    def settings(config: AttackStudyConfig) -> dict[str, Any]:
        return {t.name: t.settings for t in run._tasks(one_seed(config, tmp_path), run.PARTS)}

    first = settings(TINY)
    other = settings(replace(TINY, name="x", seeds=(0, 1), attacks=TABLE, stealth_images=5))
    moved = {name for name in first if first[name] != other[name]}
    assert moved == {"data", "stealth-badnets-0", "stealth-wanet-0"}
    longer = settings(replace(TINY, train=replace(TINY.train, epochs=3)))
    assert {n for n in first if first[n] != longer[n]} == {n for n in first if "victim" in n}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("data", [*DATA, "some/photos"])
def test_every_profile_has_numbers_for_every_data_set(profile: Any, data: str) -> None:
    config = attack_profile(profile, data, target=1)
    assert (config.data.name, config.target, config.profile) == (data, 1, profile)
    assert all(table_attack(name, config).label_map for name in config.rows)
    if profile == "paper":
        assert len(config.seeds) == 3 and config.data.limit is None and config.victim.width == 64
    size = config.data.image_size or 32
    strength = config.settings.get("wanet", {}).get("strength", 0.5)
    assert profile == "tiny" or strength == 0.5 * size / 32


def test_mnist_is_for_the_attacks_that_were_published_on_it() -> None:
    assert attack_profile("small", "mnist").rows == ("wanet", "marksman", "input-aware")


def test_rows_come_in_the_order_of_the_table() -> None:
    assert replace(TINY, attacks=("watermark", "clean", "badnets")).rows == ("badnets", "watermark")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("badnet",)}, "'badnet'"),
        ({"attacks": ()}, "got none"),
        ({"recipes": ("fried",)}, "'fried'"),
        ({"recipes": ()}, "got none"),
        ({"settings": {"x": {}}}, "'x'"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "different seeds"),
        ({"seeds": (-1,)}, ">= 0"),
        ({"profile": "huge"}, "'huge'"),
        ({"ratio": 0.0}, "poison ratio"),
        ({"weight": 1.5}, "weight in"),
        ({"corruption_probability": 0.0}, "corruption_probability in"),
        ({"target": -1}, "target label >= 0"),
        ({"stealth_images": 0}, "stealth_images >= 1"),
        ({"watched_images": 0}, "watched_images >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: run_attack_study(TINY, out, minutes=0), "minutes > 0"),
        (lambda out: run_attack_study(TINY, out, parts=()), "parts out of"),
        (lambda out: run_attack_study(TINY, out, parts=("all",)), "parts out of"),
        (lambda out: run_attack_study(replace(TINY, target=10), out), "below 10 classes"),
        (lambda out: run_attack_study(TINY, out, device="tpu"), "cpu or cuda"),
        (lambda out: attack_profile("vast"), "'vast'"),
        (lambda out: attack_profile("tiny", "digits", colour=1), "colour"),
    ],
)
def test_bad_input_is_refused(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
