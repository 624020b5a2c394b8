"""What wm_eval refuses where studies of attacks and defences are set up, run and summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.tests.refusals.common import Call, Cases

import wm_eval as ev

TINY = ev.population_profile("tiny")
WORLD = ev.World(ev.attack_profile("tiny", "digits"), {"clean": 5}, {"clean": 5})
CLEANING = ev.cleaning_profile("tiny", "digits")
DETECT = ev.detect_preset("digits")


def cleaning(**changes: Any) -> Call:
    return lambda _: replace(CLEANING, **changes)


def detect(**changes: Any) -> Call:
    return lambda _: replace(DETECT, **changes)


def world(**changes: Any) -> Call:
    return lambda _: replace(WORLD, **changes)


def population(**changes: Any) -> Call:
    return lambda _: replace(TINY, **changes)


def runs(call: Any, config: Any) -> dict[str, Call]:
    """What every run refuses before it starts."""
    return {
        "minutes": lambda tmp: call(config, tmp, minutes=0),
        "device": lambda tmp: call(config, tmp, device="abacus"),
    }


def victims(tmp: Path) -> Path:
    (tmp / "models").mkdir()
    (tmp / "models" / "victim-plain-clean-0.safetensors").write_bytes(b"no model")
    return tmp


CASES: Mapping[str, Cases] = {
    "AttackStudyConfig": {
        "attack": lambda _: ev.AttackStudyConfig(attacks=("nothing",)),
        "no attack": lambda _: ev.AttackStudyConfig(attacks=()),
        "profile": lambda _: ev.AttackStudyConfig(profile="huge"),  # type: ignore[arg-type]
        "recipe": lambda _: ev.AttackStudyConfig(recipes=("secret",)),  # type: ignore[arg-type]
        "seeds": lambda _: ev.AttackStudyConfig(seeds=(0, 0)),
        "ratio": lambda _: ev.AttackStudyConfig(ratio=2.0),
    },
    "attack_profile": {
        "profile": lambda _: ev.attack_profile("huge"),  # type: ignore[arg-type]
        "changes": lambda _: ev.attack_profile("tiny", "digits", colour=1),
    },
    "run_attack_study": {
        "minutes": lambda tmp: ev.run_attack_study(
            ev.attack_profile("tiny", "digits"), tmp, minutes=0
        ),
        "part": lambda tmp: ev.run_attack_study(
            ev.attack_profile("tiny", "digits"), tmp, parts=("nothing",)
        ),
        "data": lambda tmp: ev.run_attack_study(ev.attack_profile("tiny", str(tmp / "none")), tmp),
        "target": lambda tmp: ev.run_attack_study(
            ev.attack_profile("tiny", "digits", target=10), tmp
        ),
    },
    "write_tables": {"no records": lambda tmp: ev.write_tables(tmp)},
    "draw_figure": {
        "no records": lambda tmp: ev.draw_figure(tmp),
        "images": lambda tmp: ev.draw_figure(tmp, images=0),
    },
    "summarise_detection": {"no scan": lambda _: ev.summarise_detection({})},
    "detector": {"name": lambda _: ev.detector("strip")},
    "DetectConfig": {
        "attack": detect(attack="nothing"),
        "detectors": detect(detectors=("nothing",)),
        "no detector": detect(detectors=()),
        "preset of detectors": detect(preset="secret"),
        "method": detect(methods=("nothing",)),
        "share": detect(share=0.0),
        "cleaning_shares": detect(cleaning_shares=(2.0,)),
        "rates": detect(rates=(0.0,)),
        "images": detect(images=0),
        "seeds": detect(seeds=()),
    },
    "detect_preset": {
        "changes": lambda _: ev.detect_preset("digits", colour=1),
        "attack": lambda _: ev.detect_preset("digits", attack="nothing"),
        "width": lambda _: ev.detect_preset("digits", width=0),
    },
    "run_detect": {
        **runs(ev.run_detect, DETECT),
        "part": lambda tmp: ev.run_detect(DETECT, tmp, parts=("nothing",)),
        "target": lambda tmp: ev.run_detect(replace(DETECT, target=10), tmp),
        "data": lambda tmp: ev.run_detect(
            replace(DETECT, data=ev.DataConfig(str(tmp))), tmp / "out"
        ),
    },
    "scan_victims": {
        "no victims": lambda tmp: ev.scan_victims(tmp / "none", tmp),
        "no records": lambda tmp: ev.scan_victims(victims(tmp), tmp / "out"),
        "the same folder": lambda tmp: ev.scan_victims(tmp, tmp),
        "images": lambda tmp: ev.scan_victims(tmp, tmp / "out", images=1),
        "minutes": lambda tmp: ev.scan_victims(tmp, tmp / "out", minutes=0),
        "detector": lambda tmp: ev.scan_victims(victims(tmp), tmp / "out", name="nothing"),
    },
    "write_index_figure": {"no records": lambda tmp: ev.write_index_figure(tmp)},
    "CleaningConfig": {
        "methods": cleaning(methods=("nothing",)),
        "no method": cleaning(methods=()),
        "settings": cleaning(settings={"nothing": {}}),
        "shares": cleaning(shares=(0.1, 0.1)),
        "steps": cleaning(steps=0),
        "images": cleaning(images=1),
        "preset of methods": cleaning(preset="secret"),
        "alpha": cleaning(alpha=1.0),
    },
    "cleaning_profile": {
        "profile": lambda _: ev.cleaning_profile("huge"),  # type: ignore[arg-type]
        "changes": lambda _: ev.cleaning_profile("tiny", "digits", colour=1),
        "attack": lambda _: ev.cleaning_profile("tiny", "digits", attacks=("nothing",)),
    },
    "run_cleaning": {
        **runs(ev.run_cleaning, CLEANING),
        "victims": lambda tmp: ev.run_cleaning(CLEANING, tmp / "out", victims=tmp, progress=False),
        "target": lambda tmp: ev.run_cleaning(
            replace(CLEANING, study=replace(CLEANING.study, target=10)), tmp
        ),
        "setting": lambda tmp: ev.run_cleaning(
            replace(CLEANING, settings={"nad": {"power": 0.0}}), tmp
        ),
    },
    "write_cleaning_tables": {"no records": lambda tmp: ev.write_cleaning_tables(tmp)},
    "der": {
        "acc_before": lambda _: ev.der(1.5, 1.0, 0.9, 0.0),
        "asr_after": lambda _: ev.der(0.9, 1.0, 0.9, float("nan")),
        "percent": lambda _: ev.der(90.0, 100.0, 90.0, 0.0),
    },
    "World": {
        "attack": world(test={"nothing": 1}),
        "count": world(calibration={"clean": -1}),
        "too many": world(calibration={"clean": 1001}),
        "ratio": world(ratios={"badnets": 2.0}),
        "ratio of no attack": world(ratios={"clean": 0.1}),
    },
    "PopulationConfig": {
        "no world": population(worlds={}),
        "name of a world": population(worlds={"../elsewhere": WORLD}),
        "a world called all": population(worlds={"all": WORLD}),
        "no detector": population(detectors={}),
        "detector": population(detectors={"nothing": "fast"}),
        "preset of a detector": population(detectors={"nc": "secret"}),
        "images": population(images=1),
        "floor": population(floor=0.0),
        "alpha": population(alpha=1.0),
    },
    "population_profile": {
        "profile": lambda _: ev.population_profile("huge"),  # type: ignore[arg-type]
        "changes": lambda _: ev.population_profile("tiny", colour=1),
    },
    "run_population": {
        **runs(ev.run_population, TINY),
        "world": lambda tmp: ev.run_population(TINY, tmp, worlds=("nothing",)),
        "no world": lambda tmp: ev.run_population(TINY, tmp, worlds=()),
        "half": lambda tmp: ev.run_population(TINY, tmp, halves=("both",)),  # type: ignore[arg-type]
        "data": lambda tmp: ev.run_population(
            replace(TINY, worlds={"w": replace(WORLD, study=ev.attack_profile("tiny", str(tmp)))}),
            tmp / "out",
        ),
    },
    "summarise": {
        "no scan": lambda _: ev.summarise([]),
        "floor": lambda _: ev.summarise([], floor=0.0),
        "alpha": lambda _: ev.summarise([], alpha=1.0),
    },
    "write_population": {"no records": lambda tmp: ev.write_population(tmp)},
}
