"""Run the experiment: stage by stage, in time, and on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.run import Task, planted
from wm_eval.attacks.study import AttackStudy
from wm_eval.config import plain
from wm_eval.datasets import study_images
from wm_eval.detectors import DETECTORS
from wm_eval.executors import HERE, Executor, Outcome, Turn, run_units
from wm_eval.paper2.closeness import compare_triggers
from wm_eval.paper2.config import FINE_TUNING, NAD, DetectConfig
from wm_eval.paper2.stages import (
    clean_victim,
    describe_images,
    measure_victim,
    scan_victim,
)
from wm_eval.paper2.summary import named
from wm_eval.paper2.trial import Trial
from wm_eval.records import canonical_json, hardware, write_text
from wm_eval.units import grouped, to_units
from wm_eval.workspace import Workspace

PARTS = ("detection", "cleaning", "pictures", "rates")


class _Job(NamedTuple):
    """A stage of one seed."""

    trial: Trial
    task: Task


def run_detect(
    config: DetectConfig,
    out: str | Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    parts: Sequence[str] = PARTS[:3],
    progress: bool = True,
    say: Callable[[str], None] = print,
    executor: Executor = HERE,
) -> Path:
    """Train victims with and without a backdoor, scan them, clean them; or do the rest of it.

    The folder is laid out as a study of attacks: victims and triggers that are there already, made
    with the same settings, are not trained again, and another attack goes into the same folder. A
    stage that cannot be done leaves its reason in ``failures/STAGE.json``, and the others go on.

    Args:
        config: The experiment.
        out: Its folder.
        device: "cpu" or a cuda device.
        minutes: No stage and no training epoch starts later than this; the same call goes on.
        parts: What is wanted: "detection" of all seeds, then "cleaning" of all seeds, then
            "pictures" and "rates", the sweep of learning rates, of the first seed.
        progress: Show how far long stages are.
        say: Called with a line for every stage.
        executor: Where victims are trained and scanned, each as one unit, and cleaned.

    Returns:
        The folder of records: ``victim-V-SEED``, ``scan-DETECTOR-V-SEED`` (V: the attack, or
        "clean"), ``cleaning-METHOD-SHARE-ATTACK-SEED``, ``rate-METHOD-RATE-ATTACK-SEED``,
        ``pictures-DETECTOR-ATTACK-SEED``, and those of the training.

    Raises:
        ValueError: Data that cannot be loaded, a target that is no class, no minutes, or an
            unknown part.
    """
    hardware(device)  # refuses a device that is none before any work is done
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"expected parts out of {', '.join(PARTS)}, got {', '.join(parts)}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    study_images.cache_clear()
    data = study_images(config.data)
    if config.target >= data.num_classes:
        raise ValueError(
            f"expected a target label below {data.num_classes} classes, got {config.target}"
        )
    settings = (config, Path(out), device, progress and executor.bars, tuple(parts))
    jobs = _jobs(_trials(config, Path(out), device, False, Turn({}, None, say)), parts)
    groups = grouped((_group(job), job.task) for job in jobs)
    units = to_units(groups, partial(_unit, *settings))
    if not run_units(units, executor, deadline=deadline, say=say):
        say("out of time: the same command goes on from here")
    return Path(out) / "records"


def _trials(
    config: DetectConfig, out: Path, device: str, progress: bool, turn: Turn
) -> list[Trial]:
    data, trials = study_images(config.data), []
    for seed in config.seeds:
        space = Workspace(out, seed, data.fingerprint, device, turn.say)
        study = AttackStudy(config.study(), data, space, progress, turn.deadline)
        trials.append(Trial(config, study))
    return trials


def _group(job: _Job) -> str:
    """A victim with its scans is one unit, and so is everything that is then done to one."""
    if job.task.name.startswith(("cleaning-", "rate-", "pictures-")):
        return job.task.name
    return f"{job.task.attack or job.trial.config.attack}-{job.trial.seed}"


def _unit(
    config: DetectConfig,
    out: Path,
    device: str,
    progress: bool,
    parts: Sequence[str],
    mine: frozenset[str],
    turn: Turn,
) -> Outcome:
    """The stages of one unit, in whatever process."""
    failed = dict(turn.failed)
    jobs = _jobs(_trials(config, out, device, progress, turn), parts)
    todo = [job for job in jobs if job.task.name in mine]
    return Outcome(_work(todo, turn.deadline, failed), failed)


def _work(jobs: Iterable[_Job], deadline: float | None, failed: dict[str, str]) -> bool:
    """Do every job; False if the time ran out before the last.

    Args:
        jobs: Each after those that it needs.
        deadline: A time of `time.monotonic`.
        failed: By stage: the first on its way that failed, and why. Filled up.
    """
    for trial, task in jobs:
        if deadline is not None and time.monotonic() > deadline:
            return False
        told = reason = next((failed[i] for i in task.inputs if i in failed), None)
        space = trial.study.space
        if reason is None:
            try:
                space.stage(task.name, task.settings, task.inputs, task.work)
            except TimeoutError as error:
                space.say(f"{task.name}: {error}")
                return False
            except (ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
        _note(trial, task, reason)
        if reason is not None:
            failed[task.name] = told or f"{task.name} failed: {reason}"
    return True


def _note(trial: Trial, task: Task, reason: str | None) -> None:
    """Keep why a stage failed; forget it when the stage has succeeded."""
    path = trial.study.space.path("failures", f"{task.name}.json")
    if reason is None:
        path.unlink(missing_ok=True)
        return
    trial.study.space.say(f"{task.name}: failed: {reason}")
    kept = {"stage": task.name, "attack": task.attack, "recipe": task.recipe}
    write_text(path, canonical_json({**kept, "seed": trial.seed, "reason": reason}))


def _jobs(trials: Sequence[Trial], parts: Sequence[str]) -> Iterator[_Job]:
    """Every stage, each after those that it needs: the first table first, for all seeds."""
    first = trials[0]
    settings = {"tested": first.config.tested}
    data = Task("data", None, None, settings, (), lambda _: describe_images(first))
    yield _Job(first, data)
    works: dict[str, tuple[Callable[[Trial], Iterator[Task]], Sequence[Trial]]] = {
        "detection": (_detection, trials),
        "cleaning": (_cleaning, trials),
        "pictures": (_pictures, trials[:1]),
        "rates": (_rates, trials[:1]),
    }
    done = set[str]()
    for part in PARTS:
        if part not in parts:
            continue
        make, mine = works[part]
        for trial in mine:
            for task in make(trial):
                if task.name not in done:
                    done.add(task.name)
                    yield _Job(trial, task)


def _detection(trial: Trial) -> Iterator[Task]:
    for name in (trial.config.attack, CLEAN):
        yield from _victim(trial, name)
        for detector in trial.config.detectors:
            yield from _scan(trial, name, detector)


def _cleaning(trial: Trial) -> Iterator[Task]:
    for share in trial.config.cleaning_shares:
        for method in trial.config.cleaners:
            yield from _clean(trial, method, share, None)


def _rates(trial: Trial) -> Iterator[Task]:
    for rate in trial.config.rates:
        for method in trial.config.cleaners:
            yield from _clean(trial, method, max(trial.config.cleaning_shares), rate)


def _pictures(trial: Trial) -> Iterator[Task]:
    config = trial.config
    for detector in config.detectors:
        if DETECTORS[detector].inverts:
            yield from _scan(trial, config.attack, detector)
            yield Task(
                f"pictures-{detector}-{config.attack}-{trial.seed}",
                config.attack,
                None,
                {"pictures": config.pictures, "compared": config.compared},
                (f"scan-{detector}-{config.attack}-{trial.seed}",),
                partial(compare_triggers, trial, detector),
            )


def _victim(trial: Trial, name: str) -> Iterator[Task]:
    """A victim, what it needs, and its rates."""
    yield from planted(trial.study, "plain", name)
    settings = {"tested": trial.config.tested, "target": trial.config.target}
    inputs = [f"victim-plain-{name}-{trial.seed}"]
    if name != CLEAN:
        inputs.append(f"trigger-{name}-{trial.seed}")
    work = partial(measure_victim, trial, name)
    yield Task(f"victim-{name}-{trial.seed}", name, None, settings, tuple(inputs), work)


def _scan(trial: Trial, name: str, detector: str) -> Iterator[Task]:
    yield from planted(trial.study, "plain", name)
    config = trial.config
    settings: dict[str, Any] = {
        "images": config.images,
        "share": config.share if config.images is None else None,
        "preset": config.preset,
        "settings": dict(DETECTORS[detector].preset(config.preset).settings),
        "target": None if name == CLEAN else config.target,
    }
    yield Task(
        f"scan-{detector}-{name}-{trial.seed}",
        name,
        None,
        settings,
        (f"victim-plain-{name}-{trial.seed}",),
        partial(scan_victim, trial, name, detector),
    )


def _clean(trial: Trial, method: str, share: float, rate: float | None) -> Iterator[Task]:
    config, seed = trial.config, trial.seed
    yield from _victim(trial, config.attack)
    inputs = [f"victim-{config.attack}-{seed}"]
    if method not in (FINE_TUNING, NAD):
        yield from _scan(trial, config.attack, method)
        inputs.append(f"scan-{method}-{config.attack}-{seed}")
    way = f"cleaning-{method}-{share:g}" if rate is None else f"rate-{method}-{rate:g}"
    settings = {"cleaning": plain(config.cleaning), "share": share, "rate": rate}
    work = partial(_clean_named, trial, method, share, rate)
    name = f"{way}-{config.attack}-{seed}"
    yield Task(name, config.attack, None, settings, tuple(inputs), work)


def _clean_named(
    trial: Trial, method: str, share: float, rate: float | None, checkpoint: Path
) -> Any:
    """Clean the labels that the detector's own scan named; the truth is not used."""
    labels: list[int] = []
    if method not in (FINE_TUNING, NAD):
        name = f"scan-{method}-{trial.config.attack}-{trial.seed}"
        labels = named(trial.study.space.record(name).values)
    return clean_victim(trial, method, share, rate, labels, checkpoint)


__all__ = ["PARTS", "run_detect"]
