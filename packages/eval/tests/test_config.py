from __future__ import annotations

from pathlib import Path

import pytest

from wm_eval.config import (
    DefenceConfig,
    MeasureConfig,
    StudyConfig,
    fill,
    load_study,
    plain,
)
from wm_eval.presets import PRESETS, study_preset
from wm_eval.records import canonical_json


def toml(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_ready_for_a_record(name: str) -> None:
    study = study_preset(name)
    assert study.name == name
    assert canonical_json(plain(study)) == canonical_json(plain(study_preset(name)))


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        'preset = "demo"\nname = "mine"\n[train]\nepochs = 2\nlr = 1\n'
        '[measure]\ncorruptions = ["rotation"]\n[reverse]\nlambdas = [0.1, 1, 0]\n',
    )
    study, demo = load_study(path, seed=7), study_preset("demo")
    assert (study.name, study.seed, study.train.epochs, study.train.lr) == ("mine", 7, 2, 1.0)
    assert study.measure.corruptions == ("rotation",)
    assert study.reverse.lambdas == (0.1, 1.0, 0.0)
    assert study.data == demo.data and study.nc == demo.nc
    assert study.train.batch_size == demo.train.batch_size


def test_a_table_may_start_from_a_preset_of_its_own(tmp_path: Path) -> None:
    study = load_study(toml(tmp_path, '[joint]\npreset = "paper"\niterations = 5\n'))
    assert (study.joint.recipe, study.joint.optimizer, study.joint.iterations) == (
        "paper",
        "sgd",
        5,
    )


def test_an_empty_file_is_the_default_study(tmp_path: Path) -> None:
    assert load_study(toml(tmp_path, "")) == StudyConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour' in study: expected one of "),
        ("[train]\nepoch = 1", "unknown key 'epoch' in study.train"),
        ('[train]\nepochs = "many"', "expected int for study.train.epochs, got 'many'"),
        ("[train]\nepochs = true", "expected int for study.train.epochs, got True"),
        ("[train]\nepochs = 1.5", "expected int for study.train.epochs"),
        ("[train]\nepochs = 0", "study.train: expected epochs"),
        ('[train]\nschedule = "steps"', "for study.train.schedule, got 'steps'"),
        ("train = 1", "expected a table for study.train, got 1"),
        ("[train]\nseed = 3", "expected one seed at the top of study, got one in study.train"),
        ('[joint]\npreset = "best"', "expected a recipe in"),
        ('preset = "imagenet"', "expected a study in demo, cifar10"),
        ("preset = 1", "expected a study in demo, cifar10"),
        ('[measure]\ncorruptions = ["fire"]', "expected a corruption in"),
        ("[measure]\nlimit = 5", "at least 100 test images"),
        ('[plan]\nmode = "per_batch"', "expected a static plan"),
        ("strength = 0", "expected strength > 0"),
        ("seed = -1", "expected a seed >= 0"),
        ("[defence]\nalpha = 2", "expected alpha in"),
        ("[reverse]\nlambdas = [1, 2]", "study.reverse"),
        ("x = [", "study.toml is not TOML"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_study(toml(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        load_study(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match="expected a study in"):
        study_preset("all")
    for wrong in ({"false_positive_rate": 0.5}, {"pictures": 0}):
        with pytest.raises(ValueError, match=r"^expected "):
            MeasureConfig(**wrong)
    with pytest.raises(ValueError, match="at least 1 image"):
        DefenceConfig(images=0)
    assert fill(StudyConfig(), {}) == StudyConfig()
