"""Studies as data: the shipped ones, files over them, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from wm_eval.cli import shipped_names
from wm_eval.config import (
    DefenderConfig,
    MeasureConfig,
    Setting,
    Study,
    WatermarkConfig,
    load_study,
    plain,
    shipped_studies,
)
from wm_eval.methods import CONTROLS, build_method, detectors_of
from wm_eval.records import canonical_json
from wm_eval.titles import METHODS
from wm_inject.core.toml_settings import fill, to_toml


def toml(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_every_shipped_study_is_whole_and_says_what_to_expect() -> None:
    assert shipped_names() == sorted(shipped_studies())
    for name, path in shipped_studies().items():
        study, text = load_study(name), path.read_text(encoding="utf-8")
        assert study.name == name
        assert text.startswith("# ") and "\n# Expected: " in text.partition("\nname = ")[0]
        assert fill(Study(attacks=("clean",)), tomllib.loads(to_toml(study))) == study
        canonical_json(plain(study))


def test_the_demo_with_ready_made_weights_differs_in_nothing_else() -> None:
    demo, ready = plain(load_study("demo")), plain(load_study("demo-pretrained"))
    assert {name for name in demo if demo[name] != ready[name]} == {"name", "watermark"}


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    text = (
        'base = "demo"\nname = "mine"\n[train]\nepochs = 2\nlr = 1\n'
        '[measure]\ncorruptions = ["rotation"]\n[detectors.nc]\nsteps = 5\n'
    )
    path = toml(tmp_path, f"mitigations = {{}}\n{text}")
    study, demo = load_study(path, seed=7, changes="train.epochs = 3"), load_study("demo")
    assert (study.name, study.seeds, study.train.epochs, study.train.lr) == ("mine", (7,), 3, 1.0)
    assert study.measure.corruptions == ("rotation",)
    assert study.detectors == {"nc": {"steps": 5}}  # a table of names takes the place of the other
    assert study.data == demo.data and study.watermark == demo.watermark
    assert study.train.batch_size == demo.train.batch_size
    assert load_study("detection-mnist", seed=100).seeds == tuple(range(100, 110))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("colour = 1", "colour"),
        ("[train]\nepoch = 1", "study.train"),
        ('[train]\nepochs = "many"', "study.train.epochs"),
        ("[train]\nepochs = 0", "study.train"),
        ("train = 1", "study.train"),
        ("[attack_train.soap]\nepochs = 1", "attack_train"),
        ("[attack_train.wanet]\nepoch = 1", "attack_train.wanet"),
        ("[train]\nseed = 3", "seeds at the top"),
        ('base = "imagenet"', "base"),
        ('[measure]\ncorruptions = ["fire"]', "corruption"),
        ('attacks = ["soap"]', "attacks"),
        ("attacks = []", "at least one attack"),
        ("[detectors.soap]", "detector"),
        ("[detectors.nc]\nsoap = 1", "soap"),
        ("[mitigations.soap]", "mitigations"),
        ("[mitigations.nad]\nsoap = 1", "soap"),
        ("[mitigations.unlearning-nc]", "detector nc"),
        ("[settings.Loud]", "settings"),
        ("[settings.a.test]\nsoap = 1", "attacks"),
        ("x = [", "not TOML"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_study(toml(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (MeasureConfig, {"false_positive_rate": 0.5}),
        (MeasureConfig, {"pictures": 0}),
        (DefenderConfig, {"images": 1}),
        (DefenderConfig, {"fractions": (0.0,)}),
        (DefenderConfig, {"fractions": (0.1, 0.1)}),
        (DefenderConfig, {"alpha": 1.0}),
        (DefenderConfig, {"passes": 0}),
        (Setting, {"test": {"clean": 1001}}),
        (Setting, {"triggers": {"clean": {}}}),
        (WatermarkConfig, {"strength": 0.0}),
        (WatermarkConfig, {"weight": 1.1}),
        (WatermarkConfig, {"pretrained": "tiny-32", "picture": "a.png"}),
        (Study, {}),
        (Study, {"attacks": ("clean",), "seeds": (1, 1)}),
        (Study, {"attacks": ("clean",), "seeds": (-1,)}),
        (Study, {"attacks": ("clean",), "ratio": 0.0}),
        (Study, {"attacks": ("clean",), "name": "No Name"}),
        (Study, {"attacks": ("clean",), "parts": ("soap",)}),
        (Study, {"attacks": ("clean",), "learning_rates": (0.0,)}),
    ],
)
def test_values_outside_their_range_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        kind(**wrong)


def test_no_such_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TOML file"):
        load_study("all")
    with pytest.raises(ValueError, match="found none"):
        load_study(tmp_path / "missing.toml")


def test_a_population_counts_its_models() -> None:
    setting = Setting(calibration={"clean": 2}, test={"badnets": 1, "clean": 1})
    assert setting.models("calibration") == (("clean", 0), ("clean", 1))
    assert setting.models("test") == (("clean", 1000), ("badnets", 1000))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_same_steps(name: str) -> None:
    method = build_method(name, steps=7)
    assert method.name == ("unlearning" if name.startswith("unlearning-") else method.name)
    assert f"{7}" in str(plain(method)) or name in ("neuron-pruning", "clp", "head-unlearning")


def test_the_control_of_unlearning_differs_in_nothing_but_the_triggers() -> None:
    for control, unlearning in CONTROLS.items():
        for changes in ({}, {"lr": 0.5}):
            one, other = (build_method(n, steps=7, **changes) for n in (control, unlearning))
            assert plain(one).items() <= plain(other).items()
        assert not detectors_of(control)
    in_place = plain(build_method("unlearning-nc", steps=7))
    assert not in_place["append"] and in_place["trigger_share"] == 0.2


def test_methods_refuse() -> None:
    with pytest.raises(ValueError, match="soap"):
        build_method("soap", steps=1)
    with pytest.raises(ValueError, match="preset"):
        build_method("nad", steps=10, preset="vast")
    with pytest.raises(ValueError, match="soap"):
        build_method("anp", steps=10, soap=1)
