"""Run a study of attacks: stage by stage, in time, and on where it stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wm_eval.attacks.config import CLEAN, AttackStudyConfig, Recipe
from wm_eval.attacks.stages import (
    describe_images,
    draw_tiles,
    fit_trigger,
    measure_cell,
    measure_stealth,
    train_victim,
)
from wm_eval.attacks.study import AttackStudy
from wm_eval.config import plain
from wm_eval.datasets import study_images
from wm_eval.executors import HERE, Executor, Outcome, Turn, run_units
from wm_eval.records import canonical_json, hardware, write_text
from wm_eval.units import Task as Task
from wm_eval.units import grouped, to_units
from wm_eval.workspace import Workspace
from wm_inject.attacks import ATTACKS, list_attacks

PARTS = ("cells", "stealth", "figure")
# Whose trigger depends on a classifier: on the clean victim, or on one that is trained with it.
_NEEDS = {name: ATTACKS[name].needs for name in list_attacks()}
SEARCHES = tuple(name for name, needs in _NEEDS.items() if needs == "clean-classifier")
_TRAINS = tuple(name for name, needs in _NEEDS.items() if needs == "co-training")
# Whose trigger is only finished by the training of the victim.
_FINISHED_BY_VICTIM = tuple(name for name, needs in _NEEDS.items() if needs == "victim")


def run_attack_study(
    config: AttackStudyConfig,
    out: str | Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    executor: Executor = HERE,
) -> Path:
    """Run a study of attacks, or the rest of it.

    A stage that cannot be done leaves its reason in ``failures/STAGE.json``, and so do those that
    need it; the others go on.

    Args:
        config: The study.
        out: Its folder; ``records/``, ``models/``, ``pictures/`` and ``failures/`` go there.
        device: "cpu" or a cuda device.
        minutes: No stage and no training epoch starts later than this; the same call goes on.
        parts: What is wanted: "cells" of the table, "stealth" figures, tiles of the "figure".
        progress: Show how far long stages are.
        say: Called with a line when a stage starts, fails or is skipped; writes to stderr if None.
        executor: Where the victims of the attacks are made and measured, each as one unit.

    Returns:
        The folder of records.

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
    out = Path(out)
    speak = say if say is not None else (_stderr if progress else _silent)
    units = []
    for seed in config.seeds:
        study = AttackStudy(config, data, Workspace(out, seed, data.fingerprint, device, speak))
        groups = grouped((_group(study, task), task) for task in _tasks(study, parts))
        work = partial(_unit, config, out, device, progress and executor.bars, seed, tuple(parts))
        units += to_units(groups, work)
    if not run_units(units, executor, deadline=deadline, say=speak):
        speak("out of time: the same command goes on from here")
    return out / "records"


def _group(study: AttackStudy, task: Task) -> str:
    """An attack with all that belongs to its first recipe; of other recipes, what is added."""
    recipe = task.recipe or study.config.recipes[0]
    return f"{recipe}-{task.attack or CLEAN}-{study.seed}"


def _unit(
    config: AttackStudyConfig,
    out: Path,
    device: str,
    progress: bool,
    seed: int,
    parts: Sequence[str],
    mine: frozenset[str],
    turn: Turn,
) -> Outcome:
    """The tasks of one unit, in whatever process."""
    data = study_images(config.data)
    space = Workspace(out, seed, data.fingerprint, device, turn.say)
    study = AttackStudy(config, data, space, progress, turn.deadline)
    failed = dict(turn.failed)
    tasks = [task for task in _tasks(study, parts) if task.name in mine]
    return Outcome(_work(study, tasks, failed), failed)


def _work(study: AttackStudy, tasks: Iterable[Task], failed: dict[str, str]) -> bool:
    """Do every task; False if the time ran out before the last.

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


def _tasks(study: AttackStudy, parts: Sequence[str]) -> Iterator[Task]:
    """Every stage of a seed, each after those that it needs; attack by attack."""
    done = set[str]()
    for task in _all_tasks(study, parts):
        if task.name not in done:
            done.add(task.name)
            yield task


def _all_tasks(study: AttackStudy, parts: Sequence[str]) -> Iterator[Task]:
    """The first recipe with all that belongs to an attack, then the other recipes."""
    config = study.config
    if study.seed == config.seeds[0]:
        settings = _counts(study) | study.planned()
        yield Task("data", None, None, settings, (), lambda _: describe_images(study))
    for place, recipe in enumerate(config.recipes):
        if "cells" in parts:
            yield _victim(study, recipe, CLEAN)
            yield _cell(study, recipe, CLEAN)
        for name in config.rows:
            if place == 0:
                yield from _appearance(study, name, parts)
            if "cells" in parts:
                yield from planted(study, recipe, name)
                yield _cell(study, recipe, name)


def _appearance(study: AttackStudy, name: str, parts: Sequence[str]) -> Iterator[Task]:
    """Stealth figures and tiles of an attack, and what they need."""
    wanted = [part for part in ("stealth", "figure") if part in parts]
    if not wanted:
        return
    recipe: Recipe | None = study.config.recipes[0] if name in _FINISHED_BY_VICTIM else None
    seed, config = study.seed, study.config
    if recipe is None:
        yield from _trigger(study, name)
        inputs: tuple[str, ...] = (f"trigger-{name}-{seed}",)
    else:
        yield from planted(study, recipe, name)
        inputs = (f"victim-{recipe}-{name}-{seed}",)
    counts: dict[str, dict[str, Any]] = {
        "stealth": {"images": config.stealth_images, "target": config.target},
        "figure": {"pictures": config.measure.pictures, "target": config.target},
    }
    works = {"stealth": measure_stealth, "figure": draw_tiles}
    for part in wanted:
        work = partial(works[part], study, recipe, name)
        yield Task(f"{part}-{name}-{seed}", name, recipe, counts[part], inputs, work)


def _trigger(study: AttackStudy, name: str) -> Iterator[Task]:
    settings = {"attack": study.described(name), "target": study.config.target}
    inputs: tuple[str, ...] = ()
    if name in SEARCHES:
        clean = _victim(study, "plain", CLEAN)
        yield clean
        inputs = (clean.name,)
    elif name in _TRAINS:
        settings |= _training(study)
    work = partial(fit_trigger, study, name)
    yield Task(f"trigger-{name}-{study.seed}", name, None, settings, inputs, work)


def planted(study: AttackStudy, recipe: Recipe, name: str) -> Iterator[Task]:
    """The stages that end in a victim: its trigger, what that needs, and its training."""
    if name == CLEAN:
        yield _victim(study, recipe, CLEAN)
        return
    yield from _trigger(study, name)
    yield _victim(study, recipe, name)


def _victim(study: AttackStudy, recipe: Recipe, name: str) -> Task:
    config, settings = study.config, _training(study)
    inputs: tuple[str, ...] = ()
    settings |= {"recipe": recipe, "watched_images": config.watched_images}
    if recipe == "corrupted":
        settings["corruption_probability"] = config.corruption_probability
    if name != CLEAN:
        attack = study.attack(name)
        settings |= {"attack": study.described(name), "target": config.target}
        settings |= {"label_map": attack.label_map, "mode": attack.mode}
        settings |= {"ratio": attack.ratio if config.ratio is None else config.ratio}
        inputs = (f"trigger-{name}-{study.seed}",)
    work = partial(train_victim, study, recipe, name)
    return Task(f"victim-{recipe}-{name}-{study.seed}", name, recipe, settings, inputs, work)


def _cell(study: AttackStudy, recipe: Recipe, name: str) -> Task:
    seed, config = study.seed, study.config
    settings = _counts(study) | {"target": config.target}
    inputs = [f"victim-{recipe}-{name}-{seed}"]
    if name != CLEAN:
        inputs += [f"trigger-{name}-{seed}", f"victim-{recipe}-{CLEAN}-{seed}"]
    work = partial(measure_cell, study, recipe, name)
    return Task(f"cell-{recipe}-{name}-{seed}", name, recipe, settings, tuple(inputs), work)


def _counts(study: AttackStudy) -> dict[str, Any]:
    return {"corruptions": list(study.corruptions), "limit": study.config.measure.limit}


def _training(study: AttackStudy) -> dict[str, Any]:
    config = study.config
    train = {name: value for name, value in plain(config.train).items() if name != "seed"}
    return {"victim": plain(config.victim), "train": train, "limit": config.data.limit}


def _stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _silent(line: str) -> None:
    """Say nothing."""
