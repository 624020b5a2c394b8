"""Train a population of classifiers and let every detector look at every one of them.

Every world is a folder of its own, laid out as a study of attacks. A model with its scans is one
unit of work. What is done is kept; the same call goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.run import SEARCHES, Task, planted
from wm_eval.attacks.study import AttackStudy, victim_file
from wm_eval.datasets import study_images
from wm_eval.detectors import detector
from wm_eval.executors import HERE, Executor, Outcome, Turn, Unit, run_units
from wm_eval.measure import scan_values
from wm_eval.population.config import HALVES, Half, PopulationConfig, World
from wm_eval.population.plan import write_plan
from wm_eval.records import canonical_json, hardware, write_text
from wm_eval.workspace import Made, Workspace
from wm_victim import Dataset, defender_subset, load_classifier


def run_population(
    config: PopulationConfig,
    out: str | Path,
    *,
    worlds: Sequence[str] | None = None,
    halves: Sequence[Half] = HALVES,
    scans: bool = True,
    device: str = "cpu",
    minutes: float | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
    executor: Executor = HERE,
) -> list[Path]:
    """Train and scan every model of a population, or do the rest of it.

    A stage that cannot be done leaves its reason in ``failures/STAGE.json`` of its world, and the
    others go on.

    Args:
        config: The population.
        out: Its folder; each world has ``records/`` and ``models/`` of its own inside, and in
            ``population.json`` how many models it is to have.
        worlds: Only these; all if None.
        halves: Only these: "calibration" or "test".
        scans: Scan what was trained; only train it if not.
        device: "cpu" or a cuda device.
        minutes: Nothing starts later than this; the same call goes on.
        progress: Show how far long stages are.
        say: Called with a line for every stage.
        executor: Where models are trained and scanned, each as one unit.

    Returns:
        The folders of records, one per world.

    Raises:
        ValueError: An unknown world or half, data that cannot be loaded, or no minutes.
    """
    hardware(device)  # refuses a device that is none before any work is done
    chosen = tuple(config.worlds) if worlds is None else tuple(worlds)
    for what, names, known in (
        ("worlds", chosen, tuple(config.worlds)),
        ("halves", tuple(halves), HALVES),
    ):
        if not names or set(names) - set(known):
            raise ValueError(f"expected {what} out of {', '.join(known)}, got {', '.join(names)}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    units = []
    for name in chosen:
        work = _World(config, name, Path(out) / name, device, progress and executor.bars, scans)
        write_plan(work.folder, work.world)
        units += work.units(halves)
    study_images.cache_clear()
    if not run_units(units, executor, deadline=deadline, say=say):
        say("out of time: the same command goes on from here")
    return [Path(out) / name / "records" for name in chosen]


@dataclass(frozen=True)
class _World:
    """The work on one world."""

    config: PopulationConfig
    name: str
    folder: Path
    device: str
    progress: bool
    scans: bool

    @property
    def world(self) -> World:
        """What it is."""
        return self.config.worlds[self.name]

    def units(self, halves: Sequence[Half]) -> list[Unit]:
        """Every model of some halves; a search for a trigger waits for the clean one."""
        units: list[Unit] = []
        for half in halves:
            models = self.world.models(half)
            for attack, seed in models:
                clean = attack in SEARCHES and (CLEAN, seed) in models
                after = (self._unit_name(CLEAN, seed),) if clean else ()
                work = partial(self.model, half, attack, seed)
                units.append(Unit(self._unit_name(attack, seed), work, after))
        return units

    def _unit_name(self, attack: str, seed: int) -> str:
        return f"{self.name}-{attack}-{seed}"

    def model(self, half: Half, attack: str, seed: int, turn: Turn) -> Outcome:
        """Train one model and scan it, in whatever process."""
        data = study_images(self.world.study.data)
        config = self.world.study_of(attack, seed, num_classes=data.num_classes)
        space = Workspace(self.folder, seed, data.fingerprint, self.device, turn.say)
        study = AttackStudy(config, data, space, self.progress, turn.deadline)
        for task in self._tasks(study, half, attack):
            if turn.deadline is not None and time.monotonic() > turn.deadline:
                return Outcome(finished=False)
            reason = None
            try:
                space.stage(task.name, task.settings, task.inputs, task.work)
            except TimeoutError as error:
                turn.say(str(error))
                return Outcome(finished=False)
            except (ValueError, RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
            self._note(task, seed, reason, turn.say)
            # The other detectors can still look at the model; without one nothing can.
            if reason is not None and not task.name.startswith("scan-"):
                break
        return Outcome()

    def _tasks(self, study: AttackStudy, half: Half, attack: str) -> Iterator[Task]:
        seed = study.seed
        yield from planted(study, "plain", attack)
        for name, preset in self.config.detectors.items() if self.scans else ():
            settings = {
                "images": self.config.images,
                "half": half,
                "detector": dict(detector(name, preset).settings),
            }
            yield Task(
                f"scan-{name}-{attack}-{seed}",
                attack,
                "plain",
                settings,
                (f"victim-plain-{attack}-{seed}",),
                partial(scan_victim, study, half, attack, name, preset, self.config.images),
            )

    def _note(self, task: Task, seed: int, reason: str | None, say: Callable[[str], None]) -> None:
        """Keep why a stage failed; forget it when the stage has succeeded."""
        path = self.folder / "failures" / f"{task.name}.json"
        if reason is None:
            path.unlink(missing_ok=True)
            return
        say(f"{task.name}: failed: {reason}")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"stage": task.name, "attack": task.attack, "recipe": task.recipe}
        write_text(path, canonical_json({**kept, "seed": seed, "reason": reason}))


def scan_victim(
    study: AttackStudy,
    half: Half,
    attack: str,
    name: str,
    preset: str,
    images: int,
    checkpoint: Path,
) -> Made:
    """One detector's look at one victim, with everything that a verdict can be made from."""
    data: Dataset = study.data
    model = load_classifier(study.space.path(victim_file("plain", attack, study.seed)))
    mine = defender_subset(data.train, count=images, seed=study.seed).to(study.device)
    report = detector(name, preset).scan(
        model.to(study.device),
        mine.images,
        labels=mine.labels,
        seed=study.seed,
        progress=study.progress,
        checkpoint=checkpoint,
    )
    watched = study.space.record(f"victim-plain-{attack}-{study.seed}").values["history"]["watched"]
    values = scan_values(report) | {
        "attack": attack,
        "half": half,
        "defence": name,
        "preset": preset,
        "model": model.config["name"],
        "data": data.name,
        "cda": watched[-1]["cda"],
        "asr": watched[-1].get("asr"),
        "true_target": None if attack == CLEAN else study.config.target,
    }
    return Made(values)


__all__ = ["run_population", "scan_victim"]
