"""From a study to its stages: which are needed, what each depends on, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from wm_eval import stages as do
from wm_eval.config import SPLITS, Part, Study, plain
from wm_eval.detectors import DETECTORS
from wm_eval.engine import Result, Stage, file_digest
from wm_eval.methods import CONTROLS, build_method, detectors_of, rescanned
from wm_eval.records import Key, Record
from wm_eval.titles import CLEAN, NOT_REPAIRED
from wm_eval.trial import Trial, images_of
from wm_inject import pretrained_card


def study_stages(study: Study) -> Iterator[Stage]:
    """Every stage of a study that is known before it runs.

    Raises:
        ValueError: Images that cannot be loaded, or a target that is no class.
    """
    images_of.cache_clear()  # files may have changed
    data = "" if study.settings else images_of(study.data).fingerprint
    key = {"study": study.name}
    yield Stage("study", key, partial(_describe, study), plain(study), data=data)
    for name in study.settings:
        yield from _population(study, name)
    if not study.settings:
        yield from _trials(study)


def _describe(study: Study, *_: Any) -> Result:
    """What is planned: tables tell what is missing from what was never asked for."""
    planned: dict[str, Any] = {
        "attacks": list(study.rows),
        "corruptions": list(study.corruptions),
        "seeds": list(study.seeds),
        "detectors": list(study.detectors),
        "mitigations": list(study.methods),
        "fractions": list(study.defender.fractions) if study.mitigations else [],
    }
    if study.settings:
        planned = {
            "detectors": list(study.detectors),
            "settings": {
                name: {split: dict(c) for split in SPLITS if (c := setting.counts(split))}
                for name, setting in study.settings.items()
            },
        }
    values = {"profile": study.profile, "model": study.victim.model, "target": study.target}
    steps = study.defender.steps if study.defender.passes is None else None
    return Result({**values, "steps": steps, "planned": planned})


def _trials(study: Study) -> Iterator[Stage]:
    """Victims with what is measured and scanned, seed by seed; then mitigations; then pictures."""
    data = images_of(study.data)
    if study.target >= data.num_classes:
        raise ValueError(
            f"expected a target label below {data.num_classes} classes, got {study.target}"
        )
    trials = [Trial(study, seed) for seed in study.seeds]
    yield _images(trials[0])
    for trial in trials:
        for corruptions in study.corruptions:
            for attack in study.rows:
                first = corruptions == study.corruptions[0]
                yield from _attack(replace(trial, attack=attack, corruptions=corruptions), first)
    for trial in trials:
        for attack in study.rows:
            yield from _mitigations(replace(trial, attack=attack))
    for attack in study.rows:
        yield from _extras(replace(trials[0], attack=attack))


def _population(study: Study, name: str) -> Iterator[Stage]:
    """Every model of a setting with its scans."""
    yield _images(Trial(_of_setting(study, name), 0, setting=name))
    for trial in population_trials(study, name):
        yield from _victim(trial)
        for detector in trial.study.detectors:
            yield _scan(trial, detector)


def population_trials(study: Study, name: str) -> Iterator[Trial]:
    """Every model of a population's setting, as one victim each.

    Raises:
        ValueError: Images that cannot be loaded.
    """
    setting, one = study.settings[name], _of_setting(study, name)
    classes = images_of(setting.data).num_classes
    for split in SPLITS:
        for attack, seed in setting.models(split):
            target = replace(one, target=seed % classes)
            yield Trial(target, seed, attack=attack, setting=name, split=split)


def _of_setting(study: Study, name: str) -> Study:
    """The study of one setting's models."""
    setting = study.settings[name]
    return replace(
        study,
        data=setting.data,
        victim=setting.victim,
        train=setting.train,
        triggers={**study.triggers, **setting.triggers},
        detectors={
            name: settings
            for name, settings in study.detectors.items()
            if not setting.detectors or name in setting.detectors
        },
        settings={},
        attacks=(CLEAN,),
        parts=(),
    )


def _attack(trial: Trial, first: bool) -> Iterator[Stage]:
    """All that is measured of an attack, and what it needs."""
    study, attack = trial.study, trial.attack
    parts = set(study.parts)
    if first and attack != CLEAN:
        yield from _appearance(trial, parts)
    if "rates" in parts:
        yield from _rates(trial)
        if "baseline" in parts and attack != CLEAN:
            yield from _victim(trial.clean)
            yield _baseline(trial)
    if first:
        for detector in study.detectors:
            yield from _victim(trial)
            yield _scan(trial, detector)


def _appearance(trial: Trial, parts: set[Part]) -> Iterator[Stage]:
    """What triggered images look like."""
    study = trial.study
    measure, target = study.measure, study.target
    works: dict[Part, tuple[Any, dict[str, Any]]] = {
        "stealth": (do.measure_stealth, {"images": measure.stealth, "target": target}),
        "tiles": (do.draw_tiles, {"pictures": measure.pictures, "target": target}),
    }
    if trial.watermark is not None:
        works["mark"] = (do.measure_mark, plain(measure))
    by_victim = trial.definition.needs == "victim"
    maker = ("victim", trial.victim_key) if by_victim else ("trigger", trial.trigger_key)
    for part, (work, settings) in works.items():
        if part in parts:
            yield from _victim(trial) if by_victim else _trigger(trial)
            yield trial.stage(part, trial.trigger_key, partial(work, trial), settings, [maker])


def _trigger(trial: Trial) -> Iterator[Stage]:
    study = trial.study
    settings: dict[str, Any] = {"attack": trial.described, "target": study.target}
    inputs = []
    needs = trial.definition.needs
    if needs == "clean-classifier":
        yield from _victim(trial.surrogate)
        inputs.append(("victim", trial.surrogate.victim_key))
    elif needs == "co-training":
        settings |= trial.training
    # A picture or weights may change under their name: what counts is what is in them.
    watermark = trial.watermark
    if watermark is not None and watermark.pretrained is not None:
        settings["card"] = pretrained_card(watermark.pretrained)["sha256"]
    elif watermark is not None and watermark.picture is not None:
        settings["picture"] = file_digest(watermark.picture)
    work = partial(do.fit_trigger, trial)
    yield trial.stage("trigger", trial.trigger_key, work, settings, inputs)


def _victim(trial: Trial) -> Iterator[Stage]:
    """A victim, and what it needs."""
    study, settings = trial.study, {**trial.training, "watched": trial.study.measure.watched}
    inputs = []
    if trial.corruptions == "corrupted":
        settings["corruption_probability"] = study.corruption_probability
    if trial.attack != CLEAN:
        yield from _trigger(trial)
        attack = trial.definition
        settings |= {"attack": trial.described, "target": study.target, "ratio": trial.ratio}
        settings |= {"label_map": attack.label_map, "mode": attack.mode}
        if trial.adaptation is not None:
            settings["adaptation"] = plain(trial.adaptation)
        inputs.append(("trigger", trial.trigger_key))
    work = partial(do.train_victim, trial)
    yield trial.stage("victim", trial.victim_key, work, settings, inputs)


def _rates(trial: Trial) -> Iterator[Stage]:
    """The rates of a victim, and what they need."""
    yield from _victim(trial)
    inputs = [("victim", trial.victim_key)]
    if trial.attack != CLEAN:
        yield from _rates(trial.clean)
        inputs += [("trigger", trial.trigger_key), ("rates", trial.clean.victim_key)]
    work = partial(do.measure_rates, trial)
    yield trial.stage("rates", trial.victim_key, work, trial.measured, inputs)


def _baseline(trial: Trial) -> Stage:
    """The rates of the clean victim that is shown an attack's trigger."""
    inputs = [("victim", trial.clean.victim_key), ("trigger", trial.trigger_key)]
    key = {**trial.clean.victim_key, "trigger": trial.attack}
    return trial.stage("rates", key, partial(do.measure_baseline, trial), trial.measured, inputs)


def _scan(trial: Trial, detector: str) -> Stage:
    target = None if trial.attack == CLEAN else trial.study.target
    stage = trial.stage(
        "scan",
        {**trial.victim_key, "detector": detector},
        partial(do.scan_victim, trial, detector),
        {**_scanner(trial, detector), "target": target},
        [("victim", trial.victim_key)],
    )
    return replace(stage, then=partial(_with_oracle_label, trial, detector))


def _scanner(trial: Trial, detector: str) -> dict[str, Any]:
    defender = trial.study.defender
    return {
        "detector": dict(trial.detector(detector).settings),
        "images": defender.images,
        "fraction": defender.fraction,
        "alpha": defender.alpha,
    }


def _mitigations(trial: Trial) -> Iterator[Stage]:
    """Every method with every fraction of the images."""
    study = trial.study
    if trial.attack == CLEAN and not study.defender.clean_victims:
        return
    if study.methods:
        yield from _rates(trial)
    for method in study.methods:
        for fraction in study.defender.fractions:
            yield _mitigation(trial, method, fraction)
    if study.methods and _reactivated(trial):
        yield from _victim(trial.clean)
        for fraction in study.defender.fractions:
            yield _reactivation(trial, fraction, None)


def _with_oracle_label(trial: Trial, detector: str, scan: Record) -> Iterator[Stage]:
    """Mitigation with the true label, where the scan did not name it but has a trigger of it."""
    defender, label = trial.study.defender, scan.values["oracle_label"]
    if trial.attack == CLEAN and not defender.clean_victims:
        return
    if not defender.oracle_labels or label in scan.values["named"]:
        return
    kept = scan.values.get("files", {})  # of universal warps those alone that work
    if DETECTORS[detector].inverts and trial.reversed_file(detector, label) not in kept:
        return
    for method in trial.study.methods:
        if detectors_of(method) == (detector,):
            for fraction in defender.fractions:
                yield _mitigation(trial, method, fraction, oracle_label=True)


def _mitigation(
    trial: Trial,
    method: str,
    fraction: float,
    *,
    oracle_label: bool = False,
    rate: float | None = None,
) -> Stage:
    study = trial.study
    lr = {} if rate is None else {"lr": rate}
    steps = {"steps": trial.steps(fraction)}
    mitigator = build_method(method, **{**steps, **study.mitigations[method], **lr})
    key = {**trial.victim_key, "method": method, "fraction": fraction, **lr}
    key["oracle_label"] = oracle_label
    settings: dict[str, Any] = {
        "method": {"name": mitigator.name, **plain(mitigator)},
        "target": study.target,
    }
    followed = not oracle_label and rate is None
    if followed and _reactivated(trial):
        settings["kept"] = True
    inputs = [("victim", trial.victim_key), ("rates", trial.victim_key)]
    inputs += [("scan", {**trial.victim_key, "detector": one}) for one in detectors_of(method)]
    controls = [name for name in study.methods if CONTROLS.get(name) == method]
    control = {**key, "method": controls[0], "oracle_label": False} if controls else None
    if control is not None:
        inputs.append(("mitigation", control))
    keep = "kept" in settings or rescanned(method)
    work = partial(do.mitigate, trial, mitigator, key, control, keep)
    stage = trial.stage("mitigation", key, work, settings, inputs)
    return replace(stage, then=partial(_follow_up, trial)) if followed else stage


def _follow_up(trial: Trial, mitigation: Record) -> Iterator[Stage]:
    """What is done with a repaired victim."""
    if not mitigation.values["done"]:
        return
    method = str(mitigation.key["method"])
    if trial.study.defender.rescan and rescanned(method):
        yield _rescan(trial, method, mitigation)
    if _reactivated(trial):
        yield _reactivation(trial, float(mitigation.key["fraction"]), mitigation)


def _rescan(trial: Trial, method: str, mitigation: Record) -> Stage:
    """Scan what was repaired as the victim was scanned."""
    (detector,) = detectors_of(method)
    key = {name: mitigation.key[name] for name in (*trial.victim_key, "method", "fraction")}
    inputs = [("mitigation", mitigation.key), ("scan", {**trial.victim_key, "detector": detector})]
    work = partial(do.rescan, trial, detector, mitigation.key)
    key["detector"] = detector
    return trial.stage("rescan", key, work, _scanner(trial, detector), inputs)


def _reactivated(trial: Trial) -> bool:
    return trial.attack != CLEAN and bool(trial.study.defender.reactivation)


def _reactivation(trial: Trial, fraction: float, mitigation: Record | None) -> Stage:
    """Train what was repaired, or the clean victim, with a few poisoned images."""
    tuning = build_method("fine-tuning", steps=trial.steps(fraction))
    method, repaired = NOT_REPAIRED, None
    made: tuple[str, Key] = ("victim", trial.clean.victim_key)
    if mitigation is not None:
        method, repaired = str(mitigation.key["method"]), mitigation.key
        made = ("mitigation", repaired)
    key = {**trial.victim_key, "method": method, "fraction": fraction}
    settings = {
        "counts": list(trial.study.defender.reactivation),
        "method": {"name": tuning.name, **plain(tuning)},
        "target": trial.study.target,
    }
    work = partial(do.reactivate, trial, tuning, repaired, fraction)
    return trial.stage("reactivation", key, work, settings, [("victim", trial.victim_key), made])


def _extras(trial: Trial) -> Iterator[Stage]:
    """What is done with the first seed alone: learning rates, pictures, exports."""
    study, measure, parts = trial.study, trial.study.measure, trial.study.parts
    if trial.attack != CLEAN:
        for rate in study.learning_rates:
            for method in study.methods:
                if method != "neuron-pruning":
                    yield _mitigation(trial, method, max(study.defender.fractions), rate=rate)
    for detector in study.detectors:
        if not DETECTORS[detector].inverts:
            continue
        key = {**trial.victim_key, "detector": detector}
        if "reversed" in parts:
            work = partial(do.draw_reversed, trial, detector)
            yield trial.stage("reversed", key, work, {}, [("scan", key)])
        if "closeness" in parts and trial.attack != CLEAN:
            settings = {"pictures": measure.pictures, "compared": measure.compared}
            work = partial(do.compare_triggers, trial, detector)
            yield trial.stage("closeness", key, work, settings, [("scan", key)])
    if "exports" in parts and trial.watermark is not None:
        key = trial.victim_key
        inputs = [("trigger", trial.trigger_key), ("victim", key)]
        if "reverse" in study.detectors:
            inputs.append(("scan", {**key, "detector": "reverse"}))
        yield trial.stage("exports", key, partial(do.export_models, trial), {}, inputs)


def _images(trial: Trial) -> Stage:
    key = {"setting": trial.setting} if trial.setting else {}
    measured = ("limit", "corrupted")
    settings = {name: x for name, x in trial.measured.items() if name in measured}
    return trial.stage("images", key, partial(do.describe_images, trial), settings)
