"""A population: who is in it, what is trained and scanned, and what a second call does.

The classifiers are trained for a moment and the detectors are stand-ins that write down what they
are shown; what real detectors say is for results/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_nc import ModelInfo, NeuralCleanse, ScanReport, judge
from wm_eval.attacks.config import AttackStudyConfig
from wm_eval.attacks.run import Task
from wm_eval.config import DataConfig, VictimConfig
from wm_eval.detectors import DETECTORS
from wm_eval.population import run
from wm_eval.population.config import (
    TEST_SEEDS,
    PopulationConfig,
    World,
    population_profile,
)
from wm_eval.population.plan import coverage_table
from wm_eval.population.run import run_population
from wm_eval.population.summary import read_scans, summarise
from wm_eval.records import canonical_json, read_records
from wm_victim import TrainConfig

STUDY = AttackStudyConfig(
    name="test",
    profile="tiny",
    data=DataConfig(name="digits", image_size=16, limit=80),
    victim=VictimConfig(model="resnet10", width=8),
    train=TrainConfig.preset("fast", epochs=1, precision="float32"),
    watched_images=20,
)
WORLD = World(STUDY, {"clean": 5}, {"clean": 1, "badnets": 2})
CONFIG = PopulationConfig({"digits": WORLD}, {"nc": "fast", "reverse": "fast"}, images=40)
SMALL = replace(CONFIG, worlds={"digits": World(STUDY, {"clean": 1})})


class Looks:
    """Stands in for every detector; the scores follow from the seed, and nothing else."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.went_on: list[bytes | None] = []  # what each found in its checkpoint
        self.broken: set[str] = set()

    def __call__(self, name: str, preset: str) -> Look:
        return Look(self, name, preset)


class Look:
    """One detector of them."""

    def __init__(self, looks: Looks, name: str, preset: str) -> None:
        self.looks, self.name = looks, name
        self.settings = NeuralCleanse.preset(preset).settings

    def scan(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor,
        seed: int,
        checkpoint: Path,
        **_: Any,
    ) -> ScanReport:
        self.looks.went_on.append(checkpoint.read_bytes() if checkpoint.is_file() else None)
        checkpoint.write_bytes(f"{self.name} {seed}".encode())
        if self.name in self.looks.broken:
            raise ValueError("no luck\ntoday")
        assert not model.training and len(labels) == len(images)
        self.looks.seen.append((self.name, seed, len(images)))
        generator = torch.Generator().manual_seed(seed)
        scores = (4 + 0.2 * torch.randn(10, generator=generator)).exp()
        subject = ModelInfo(10, 16, 1, "convolutional", len(images))
        report = judge("made up", scores, torch.ones(10), floor=0.9, seed=seed, subject=subject)
        return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Looks, list[str]]]:
    """A population that is done, what its detectors saw, and what was said."""
    out, looks, said = tmp_path_factory.mktemp("population"), Looks(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "detector", looks)
        run_population(CONFIG, out, say=said.append)
    yield out, looks, said


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    made = Looks()
    monkeypatch.setattr(run, "detector", made)
    return made


def files(out: Path) -> dict[str, bytes]:
    found = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_no_seed_is_in_both_halves(profile: Any) -> None:
    for world in population_profile(profile).worlds.values():
        calibration, test = world.models("calibration"), world.models("test")
        assert not {seed for _, seed in calibration} & {seed for _, seed in test}
        for half in (calibration, test):
            assert len(set(half)) == len(half)


def test_the_largest_calibration_half_ends_where_the_test_half_begins() -> None:
    world = World(STUDY, {"clean": TEST_SEEDS}, {"clean": 1})
    assert max(seed for _, seed in world.models("calibration")) == TEST_SEEDS - 1
    assert world.models("test") == (("clean", TEST_SEEDS),)
    with pytest.raises(ValueError, match=r"expected counts in 0 \.\. 1000"):
        World(STUDY, {"clean": TEST_SEEDS + 1})


def test_clean_models_come_first() -> None:
    world = World(STUDY, test={"wanet": 1, "badnets": 1, "clean": 2})
    names = [name for name, _ in world.models("test")]
    assert names == ["clean", "clean", "badnets", "wanet"]
    assert world.models("calibration") == ()


def test_every_model_has_a_target_of_its_own() -> None:
    world = World(STUDY, test={"badnets": 20}, ratios={"badnets": 0.2})
    studies = [world.study_of(name, s, num_classes=10) for name, s in world.models("test")]
    assert [study.target for study in studies] == [*range(10), *range(10)]
    assert {study.ratio for study in studies} == {0.2}
    assert all(study.seeds == (TEST_SEEDS + i,) for i, study in enumerate(studies))


def test_an_attack_without_a_ratio_keeps_that_of_the_study() -> None:
    world = World(replace(STUDY, ratio=0.3), test={"badnets": 1, "wanet": 1}, ratios={"wanet": 0.2})
    assert world.study_of("badnets", 0, num_classes=10).ratio == 0.3
    assert world.study_of("wanet", 0, num_classes=10).ratio == 0.2


def test_triggers_that_must_be_fitted_may_cost_more_than_the_rest() -> None:
    world = World(STUDY, test={"badnets": 1, "lf": 1}, profiles={"lf": "small"})
    assert world.study_of("badnets", 0, num_classes=10).profile == STUDY.profile == "tiny"
    assert world.study_of("lf", 0, num_classes=10).profile == "small"


@pytest.mark.parametrize("world", population_profile("small").worlds.values())
def test_no_shipped_trigger_is_fitted_as_for_a_test(world: World) -> None:
    # The tiny masks of input-aware cover half of the image, which no detector looks for.
    fitted = {"ssba", "lf", "marksman", "input-aware", "watermark"}
    for attack in fitted & {*world.calibration, *world.test}:
        assert world.study_of(attack, 0, num_classes=10).profile == "small"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"calibration": {"nothing": 1}}, "expected attacks out of clean, "),
        ({"test": {"clean": -1}}, "expected counts in 0"),
        ({"test": {"clean": 1.5}}, "expected counts in 0"),
        ({"ratios": {"badnets": 0.0}}, r"expected ratios in \(0, 1\]"),
        ({"ratios": {"clean": 0.1}}, r"expected ratios in \(0, 1\]"),
        ({"profiles": {"badnets": "huge"}}, "expected profiles out of tiny, small, paper"),
        ({"profiles": {"clean": "small"}}, "expected profiles out of tiny, small, paper"),
    ],
)
def test_a_world_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        World(STUDY, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"worlds": {}}, "at least one world"),
        ({"worlds": {"../x": WORLD}}, "names of worlds"),
        ({"worlds": {"all": WORLD}}, "names of worlds"),
        ({"detectors": {}}, "at least one world"),
        ({"detectors": {"nothing": "fast"}}, "expected a detector in"),
        ({"detectors": {"nc": "secret"}}, "expected a preset in"),
        ({"images": 1}, "at least 2 images"),
        ({"floor": 1.1}, "expected floor in"),
        ({"alpha": 0.0}, "alpha in"),
    ],
)
def test_a_population_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **changes)


def test_profiles_take_changes_and_refuse_others() -> None:
    assert population_profile("tiny", alpha=0.01, floor=1.0).alpha == 0.01
    with pytest.raises(ValueError, match="expected a profile in tiny, small"):
        population_profile("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected fields of PopulationConfig"):
        population_profile("tiny", colour=1)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_settings_of_detectors_survive_a_record(name: str) -> None:
    # A shipped calibration is found by comparing them with those of a scan.
    settings = dict(DETECTORS[name].preset("fast").settings)
    assert json.loads(canonical_json(settings)) == settings


def test_every_model_is_trained_and_scanned_by_every_detector(
    whole: tuple[Path, Looks, list[str]],
) -> None:
    out, looks, _ = whole
    records = read_records(out / "digits" / "records")
    models = [*WORLD.models("calibration"), *WORLD.models("test")]
    assert {f"victim-plain-{a}-{s}" for a, s in models} <= set(records)
    wanted = {f"scan-{d}-{a}-{s}" for d in CONFIG.detectors for a, s in models}
    assert {name for name in records if name.startswith("scan-")} == wanted
    assert sorted(looks.seen) == sorted((d, s, 40) for d in CONFIG.detectors for _, s in models)
    assert not (out / "digits" / "failures").exists()


def test_a_scan_keeps_what_its_model_is(whole: tuple[Path, Looks, list[str]]) -> None:
    out, _, _ = whole
    records = read_records(out / "digits" / "records")
    clean = records["scan-nc-clean-3"].values
    assert (clean["half"], clean["asr"], clean["true_target"]) == ("calibration", None, None)
    for seed in (1000, 1001):
        values = records[f"scan-reverse-badnets-{seed}"].values
        victim = records[f"victim-plain-badnets-{seed}"]
        assert values["true_target"] == victim.config["settings"]["target"] == seed % 10
        assert values["asr"] == victim.values["history"]["watched"][-1]["asr"]
        assert (values["half"], values["defence"], values["preset"]) == ("test", "reverse", "fast")
        assert (values["attack"], values["data"], values["model"]) == (
            "badnets",
            "digits",
            "resnet10",
        )


def test_what_was_recorded_can_be_summed_up(whole: tuple[Path, Looks, list[str]]) -> None:
    scans = read_scans(whole[0])
    assert len(scans) == 16 and {scan.world for scan in scans} == {"digits"}
    found = summarise(scans)
    assert [len(c.models) for c in found.calibrations.values()] == [5, 5]
    assert {row.detector for row in found.rows} == {"nc", "reverse", "all"}
    assert found.calibrations["nc", 10].settings == NeuralCleanse.preset("fast").settings


def test_a_second_call_does_nothing(whole: tuple[Path, Looks, list[str]], looks: Looks) -> None:
    out, _, first = whole
    before, said = files(out), list[str]()
    run_population(CONFIG, out, say=said.append)
    assert files(out) == before and not looks.seen
    assert said and all(line.endswith("done before") for line in said)
    assert not any(line.endswith("done before") for line in first if line.startswith("scan-"))


def test_other_scan_settings_are_scanned_anew(looks: Looks, tmp_path: Path) -> None:
    run_population(SMALL, tmp_path, say=lambda _: None)
    assert len(looks.seen) == 2
    run_population(replace(SMALL, images=41), tmp_path, say=lambda _: None)
    assert looks.seen[2:] == [("nc", 0, 41), ("reverse", 0, 41)]


def test_a_failed_scan_leaves_its_reason_until_it_succeeds(looks: Looks, tmp_path: Path) -> None:
    looks.broken.add("nc")
    run_population(SMALL, tmp_path, say=lambda _: None)
    failure = tmp_path / "digits" / "failures" / "scan-nc-clean-0.json"
    assert json.loads(failure.read_text())["reason"] == "no luck today"
    assert [name for name, *_ in looks.seen] == ["reverse"]  # the others go on
    looks.broken.clear()
    run_population(SMALL, tmp_path, say=lambda _: None)
    assert not failure.exists() and [name for name, *_ in looks.seen] == ["reverse", "nc"]


def test_a_scan_that_was_stopped_goes_on_and_leaves_no_file(looks: Looks, tmp_path: Path) -> None:
    looks.broken.add("nc")
    run_population(SMALL, tmp_path, say=lambda _: None)
    assert looks.went_on == [None, None]
    work = tmp_path / "digits" / "work"
    assert [path.name[:15] for path in work.iterdir()] == ["scan-nc-clean-0"]
    looks.broken.clear()
    run_population(SMALL, tmp_path, say=lambda _: None)
    assert looks.went_on[2:] == [b"nc 0"] and not list(work.iterdir())


def test_what_is_planned_is_kept(whole: tuple[Path, Looks, list[str]]) -> None:
    out, _, _ = whole
    plan = json.loads((out / "digits" / "population.json").read_text())
    assert plan == {"calibration": {"clean": 5}, "test": {"clean": 1, "badnets": 2}}
    table = coverage_table(out, read_scans(out))
    assert table is not None
    assert [row[3:] for row in table.rows] == [("5 of 5",) * 2, ("1 of 1",) * 2, ("2 of 2",) * 2]


def test_a_model_that_cannot_be_made_is_not_scanned(
    looks: Looks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Any:
        raise RuntimeError("the loss is NaN")

    def none(study: Any, recipe: str, name: str) -> Iterator[Task]:
        yield Task(f"victim-plain-{name}-{study.seed}", name, "plain", {}, (), refuse)

    monkeypatch.setattr(run, "planted", none)
    said: list[str] = []
    config = replace(SMALL, worlds={"digits": World(STUDY, {"clean": 2})})
    run_population(config, tmp_path, say=said.append)
    found = sorted(path.stem for path in (tmp_path / "digits" / "failures").glob("*.json"))
    assert found == ["victim-plain-clean-0", "victim-plain-clean-1"] and not looks.seen
    assert "victim-plain-clean-1: failed: the loss is NaN" in said


def test_out_of_time(looks: Looks, tmp_path: Path) -> None:
    said: list[str] = []
    run_population(SMALL, tmp_path, minutes=1e-9, say=said.append)
    assert said == ["out of time: the same command goes on from here"]
    assert not looks.seen
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["population.json"]


def test_only_some_worlds_and_halves_and_no_scans(looks: Looks, tmp_path: Path) -> None:
    world = World(STUDY, {"clean": 1}, {"clean": 1})
    config = replace(CONFIG, worlds={"one": world, "two": world})
    folders = run_population(
        config, tmp_path, worlds=["two"], halves=["test"], scans=False, say=lambda _: None
    )
    assert folders == [tmp_path / "two" / "records"] and not looks.seen
    assert list(read_records(folders[0])) == ["victim-plain-clean-1000"]
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"worlds": ["nothing"]}, "expected worlds out of digits, got nothing"),
        ({"worlds": []}, "expected worlds"),
        ({"halves": ["both"]}, "expected halves out of calibration, test"),
        ({"minutes": 0}, "expected minutes > 0"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_a_run_that_cannot_be(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        run_population(CONFIG, tmp_path, **changes)
    assert not list(tmp_path.iterdir())
