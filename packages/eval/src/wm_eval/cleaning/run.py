"""Run the cleaning of victims: stage by stage, in time, and on where it stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from defense_nc.protocols import Mitigator
from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.run import SEARCHES, Task, planted
from wm_eval.attacks.study import AttackStudy
from wm_eval.cleaning.config import RESCANNED, SCANNED_BY, CleaningConfig
from wm_eval.cleaning.methods import build_method
from wm_eval.cleaning.stages import (
    Job,
    clean_victim,
    describe,
    forces,
    measure_victim,
    rescan_cleaned,
    scan_victim,
)
from wm_eval.cleaning.victims import take_victims
from wm_eval.config import plain
from wm_eval.datasets import study_images
from wm_eval.executors import HERE, Executor, Outcome, Turn, Unit, run_units
from wm_eval.records import canonical_json, hardware, write_text
from wm_eval.workspace import Workspace


class _Work(NamedTuple):
    """One seed of a run."""

    config: CleaningConfig
    study: AttackStudy
    methods: Mapping[str, Mitigator]


def run_cleaning(
    config: CleaningConfig,
    out: str | Path,
    *,
    victims: str | Path | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    executor: Executor = HERE,
) -> Path:
    """Train, scan and clean victims and scan the cleaned ones, or do the rest of it.

    A stage that cannot be done leaves its reason in ``failures/STAGE.json``, and so do those that
    need it; the others go on.

    Args:
        config: What to do.
        out: Its folder: an attack study's, whose victims are used as they are, or a new one.
        victims: An attack study's folder to copy victims from; those that the settings do not fit
            are trained anew.
        device: "cpu" or a cuda device.
        minutes: No stage and no training epoch starts later than this; the same call goes on.
        progress: Show how far long stages are.
        say: Called with a line when a stage starts, fails or is skipped; writes to stderr if None.
        executor: Where victims are made, scanned and cleaned, each as one unit.

    Returns:
        The folder of records: ``scan-DETECTOR-ATTACK-SEED``, ``clean-METHOD-SHARE-ATTACK-SEED``,
        ``forced-...`` where the true target was not named, ``rescan-...``, and the victims'.

    Raises:
        ValueError: Data that cannot be loaded, a target that is no class, no minutes, or settings
            that a method refuses.
    """
    hardware(device)  # refuses a device that is none before any work is done
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    _methods(config)
    study_images.cache_clear()
    data = study_images(config.study.data)
    if config.study.target >= data.num_classes:
        raise ValueError(
            f"expected a target label below {data.num_classes} classes, got {config.study.target}"
        )
    out = Path(out)
    speak = say if say is not None else (_stderr if progress else _silent)
    if victims is not None:
        speak(f"{len(take_victims(victims, out))} records of victims taken from {victims}")
    work = partial(_unit, config, out, device, progress and executor.bars)
    if not run_units(_units(config, work), executor, deadline=deadline, say=speak):
        speak("out of time: the same command goes on from here")
    return out / "records"


def _methods(config: CleaningConfig) -> dict[str, Mitigator]:
    return {name: build_method(name, **config.told(name)) for name in config.rows}


def _units(config: CleaningConfig, work: Callable[..., Outcome]) -> list[Unit]:
    """One for each victim of each seed. A search for a trigger waits for the clean victim."""
    units = []
    for seed in config.study.seeds:
        for attack in config.attacks:
            waits = attack in SEARCHES and CLEAN in config.attacks
            after = (f"{CLEAN}-{seed}",) if waits else ()
            units.append(Unit(f"{attack}-{seed}", partial(work, seed, attack), after))
    return units


def _unit(
    config: CleaningConfig,
    out: Path,
    device: str,
    progress: bool,
    seed: int,
    attack: str,
    turn: Turn,
) -> Outcome:
    """Everything that is done to one victim, in whatever process."""
    data = study_images(config.study.data)
    space = Workspace(out, seed, data.fingerprint, device, turn.say)
    study = AttackStudy(config.study, data, space, progress, turn.deadline)
    failed = dict(turn.failed)
    tasks = _tasks(_Work(config, study, _methods(config)), attack)
    return Outcome(_do(study, tasks, failed), failed)


def _do(study: AttackStudy, tasks: Iterator[Task], failed: dict[str, str]) -> bool:
    """Do every stage; False if the time ran out before the last.

    Args:
        study: One seed of the study.
        tasks: Each after those that it needs.
        failed: By stage: the first on its way that failed, and why. Filled up.
    """
    for task in tasks:
        if study.deadline is not None and time.monotonic() > study.deadline:
            return False
        told = reason = next((failed[i] for i in task.inputs if i in failed), None)
        if reason is None:
            try:
                study.space.stage(task.name, task.settings, task.inputs, task.work)
            except TimeoutError as error:
                study.space.say(f"{task.name}: {error}")
                return False
            except (ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
        _note(study, task, reason)
        if reason is not None:
            failed[task.name] = told or f"{task.name} failed: {reason}"
    return True


def _note(study: AttackStudy, task: Task, reason: str | None) -> None:
    """Keep why a stage failed; forget it when the stage has succeeded."""
    path = study.space.path("failures", f"{task.name}.json")
    if reason is None:
        path.unlink(missing_ok=True)
        return
    study.space.say(f"{task.name}: failed: {reason}")
    kept = {"stage": task.name, "attack": task.attack, "recipe": task.recipe}
    write_text(path, canonical_json({**kept, "seed": study.seed, "reason": reason}))


def _tasks(work: _Work, attack: str) -> Iterator[Task]:
    """Every stage of a victim, each after those that it needs."""
    config, study = work.config, work.study
    if study.seed == config.study.seeds[0] and attack == config.attacks[0]:
        settings = {"planned": plain(config)}
        yield Task("cleaning", None, None, settings, (), lambda _: describe(study, config))
    for task in planted(study, "plain", attack):
        if task.attack == attack or CLEAN not in config.attacks:
            yield task  # else it is the clean victim of another unit
    yield _before(work, attack)
    for detector in config.detectors:
        yield _scan(work, detector, attack)
    yield from _cleanings(work, attack)


def _cleanings(work: _Work, attack: str) -> Iterator[Task]:
    """What is done to one victim: as scanned, then by force where the scan was wrong, then again.

    Whether there is something to force or to scan again is only known from the records before it.
    """
    config, study = work.config, work.study
    jobs = [Job(attack, method, share) for method in config.rows for share in config.shares]
    for job in jobs:
        yield _clean(work, job)
    for job in jobs:
        detector = SCANNED_BY.get(job.method)
        scan = detector and _finished(study, f"scan-{detector}-{attack}-{study.seed}")
        if scan and forces(scan):
            yield _clean(work, job._replace(forced=True))
    for job in jobs if config.rescan else ():
        cleaning = _finished(study, job.stage(study.seed)) if job.method in RESCANNED else None
        if cleaning and cleaning["cleaned"]:
            yield _rescan(work, job)


def _finished(study: AttackStudy, name: str) -> Mapping[str, Any] | None:
    """What a stage of this run has found; None if it failed."""
    failed = study.space.path("failures", f"{name}.json").exists()
    return None if failed else study.space.record(name).values


def _before(work: _Work, attack: str) -> Task:
    name = f"before-{attack}-{work.study.seed}"
    made = partial(measure_victim, work.study, attack)
    return Task(name, attack, "plain", _counted(work), (_victim(work, attack),), made)


def _scan(work: _Work, detector: str, attack: str) -> Task:
    name = f"scan-{detector}-{attack}-{work.study.seed}"
    made = partial(scan_victim, work.study, work.config, detector, attack)
    settings = _scanned(work, detector) | {"target": work.config.study.target}
    return Task(name, attack, "plain", settings, (_victim(work, attack),), made)


def _clean(work: _Work, job: Job) -> Task:
    seed, mitigator = work.study.seed, work.methods[job.method]
    settings = _counted(work) | {
        "method": {"name": mitigator.name, **plain(mitigator)},
        "share": job.share,
        "forced": job.forced,
    }
    inputs = [_victim(work, job.attack), f"before-{job.attack}-{seed}"]
    if job.method in SCANNED_BY:
        inputs.append(f"scan-{SCANNED_BY[job.method]}-{job.attack}-{seed}")
    made = partial(clean_victim, work.study, mitigator, job)
    return Task(job.stage(seed), job.attack, "plain", settings, tuple(inputs), made)


def _rescan(work: _Work, job: Job) -> Task:
    seed, detector = work.study.seed, SCANNED_BY[job.method]
    inputs = (job.stage(seed), f"scan-{detector}-{job.attack}-{seed}")
    made = partial(rescan_cleaned, work.study, work.config, job)
    settings = _scanned(work, detector)
    return Task(job.rescan(seed), job.attack, "plain", settings, inputs, made)


def _victim(work: _Work, attack: str) -> str:
    return f"victim-plain-{attack}-{work.study.seed}"


def _counted(work: _Work) -> dict[str, Any]:
    study = work.config.study
    return {"target": study.target, "limit": study.measure.limit}


def _scanned(work: _Work, detector: str) -> dict[str, Any]:
    config = work.config
    settings = plain(getattr(config, detector))
    return {"settings": settings, "images": config.images, "alpha": config.alpha}


def _stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _silent(line: str) -> None:
    """Say nothing."""


__all__ = ["run_cleaning"]
