"""Scan the victim of every attack: what the watermark paper's figure 3 is drawn from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.gather import TITLES
from wm_eval.detectors import detector
from wm_eval.executors import HERE, Executor, Outcome, Turn, Unit, run_units
from wm_eval.measure import scan_values
from wm_eval.records import hardware, read_record
from wm_eval.workspace import Made, Workspace, file_digest
from wm_victim import Dataset, defender_subset, load_classifier, load_dataset

_PREFIX = "victim-plain-"


class Victim(NamedTuple):
    """A classifier of an attack study."""

    attack: str
    seed: int
    path: Path


def scan_victims(
    victims: str | Path,
    out: str | Path,
    *,
    name: str = "nc",
    preset: str = "fast",
    images: int = 500,
    device: str = "cpu",
    minutes: float | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    executor: Executor = HERE,
) -> Path:
    """Scan every plain victim of an attack study, or the rest of them.

    Args:
        victims: The study's folder, with ``models/victim-plain-ATTACK-SEED.safetensors`` and the
            records of their images and training. It is only read.
        out: Where records go; another folder than ``victims``.
        name: The detector.
        preset: Of its settings.
        images: Clean training images of the defender.
        device: "cpu" or a cuda device.
        minutes: No scan starts later than this; the same call goes on.
        progress: Show how far long stages are.
        say: Called with a line for every scan.
        executor: Where victims are scanned, each as one unit.

    Returns:
        The folder of records, ``scan-DETECTOR-ATTACK-SEED``.

    Raises:
        ValueError: No victims, the study's own folder as ``out``, other data than the victims
            were trained on, fewer than 2 images, or no minutes.

    Source: Wang et al., "Spy-Watermark", section 3.3. The paper names neither the settings of
        Neural Cleanse nor the number of images.
    """
    victims, out = Path(victims), Path(out)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    if images < 2:
        raise ValueError(f"expected at least 2 images, got {images}")
    if victims.resolve() == out.resolve():
        raise ValueError(f"expected another folder than that of the victims, got {out}")
    hardware(device)
    settings = dict(detector(name, preset).settings)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    found = find_victims(victims)
    _loaded.cache_clear()
    _loaded(victims, found[0])
    told = {"images": images, "preset": preset, "settings": settings}
    work = partial(_unit, victims, out, name, told, device, progress and executor.bars)
    units = [Unit(f"{v.attack}-{v.seed}", partial(work, v, found[0])) for v in found]
    if not run_units(units, executor, deadline=deadline, say=say):
        say("out of time: the same command goes on from here")
    return out / "records"


def _unit(
    folder: Path,
    out: Path,
    name: str,
    told: Mapping[str, Any],
    device: str,
    progress: bool,
    victim: Victim,
    first: Victim,
    turn: Turn,
) -> Outcome:
    """The scan of one victim, in whatever process."""
    if turn.deadline is not None and time.monotonic() > turn.deadline:
        return Outcome(finished=False)
    data = _loaded(folder, first)
    space = Workspace(out, victim.seed, data.fingerprint, device, turn.say)
    settings = {**told, "victim": file_digest(victim.path)}
    scan = partial(_scan, space, data, victim, name, told["preset"], told["images"], progress)
    space.stage(f"scan-{name}-{victim.attack}-{victim.seed}", settings, (), scan)
    return Outcome()


def find_victims(folder: Path) -> list[Victim]:
    """The plain victims of an attack study, in the order of its tables.

    Raises:
        ValueError: There is none.
    """
    found = []
    for path in sorted(folder.glob(f"models/{_PREFIX}*.safetensors")):
        attack, _, seed = path.stem.removeprefix(_PREFIX).rpartition("-")
        if attack and seed.isdecimal():
            found.append(Victim(attack, int(seed), path))
    if not found:
        raise ValueError(f"expected models/{_PREFIX}ATTACK-SEED.safetensors in {folder}, got none")
    order = list(TITLES)
    return sorted(
        found, key=lambda v: (order.index(v.attack) if v.attack in order else 99, v.attack, v.seed)
    )


@lru_cache(maxsize=1)
def _loaded(folder: Path, victim: Victim) -> Dataset:
    """The images that the victims were trained on.

    Raises:
        ValueError: They cannot be loaded, or are others.
    """
    record = read_record(folder / "records" / "data.json")
    trained = read_record(folder / "records" / f"{victim.path.stem}.json")
    data = load_dataset(
        record.values["name"],
        image_size=record.values["image_size"],
        limit=trained.config["settings"]["limit"],
    )
    if data.fingerprint != record.values["fingerprint"]:
        raise ValueError(
            f"expected the images of the victims, {record.values['fingerprint'][:12]}, got "
            f"{data.fingerprint[:12]}"
        )
    return data


def _scan(
    space: Workspace,
    data: Dataset,
    victim: Victim,
    name: str,
    preset: str,
    images: int,
    progress: bool,
    checkpoint: Path,
) -> Made:
    count = min(images, len(data.train))
    mine = defender_subset(data.train, count=count, seed=victim.seed).to(space.device)
    report = detector(name, preset).scan(
        load_classifier(victim.path).to(space.device).eval(),
        mine.images,
        labels=mine.labels,
        seed=victim.seed,
        progress=progress,
        checkpoint=checkpoint,
    )
    known = {"attack": victim.attack, "defence": name, "n_images": len(mine), "data": data.name}
    return Made(scan_values(report) | known | _told(victim))


def _told(victim: Victim) -> dict[str, Any]:
    """Target and attack success, from the study's own records; None where there are none."""
    folder = victim.path.parents[1] / "records"
    told: dict[str, Any] = {"true_target": None, "asr": None}
    cell = folder / f"cell-plain-{victim.attack}-{victim.seed}.json"
    if victim.attack != CLEAN and cell.is_file():
        values = read_record(cell).values
        told = {"true_target": values["target"], "asr": values["corruptions"]["none"]["asr"]}
    return told


__all__ = ["Victim", "find_victims", "scan_victims"]
