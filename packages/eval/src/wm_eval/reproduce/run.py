"""Run the parts of a plan one after the other, as far as the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval.attacks.profiles import attack_profile
from wm_eval.attacks.run import run_attack_study
from wm_eval.cleaning.profiles import cleaning_profile
from wm_eval.cleaning.run import run_cleaning
from wm_eval.executors import Executor
from wm_eval.paper2.config import detect_preset
from wm_eval.paper2.index_scans import scan_victims
from wm_eval.paper2.run import PARTS, run_detect
from wm_eval.population.config import PopulationConfig, population_profile
from wm_eval.population.run import run_population
from wm_eval.reproduce.plan import Part, Scale
from wm_victim import load_dataset

_LATE = "out of time"


class Told(NamedTuple):
    """What became of a part: why it is missing or unfinished, None if it is done."""

    part: Part
    why: str | None


def run_parts(
    parts: Sequence[Part],
    out: str | Path,
    *,
    scale: Scale,
    executor: Executor,
    device: str = "cpu",
    minutes: float | None = None,
    say: Callable[[str], None] = print,
    after: Callable[[list[Told]], object] | None = None,
) -> list[Told]:
    """Run every part, or the rest of it; what cannot be run is told, and the others go on.

    Args:
        parts: Of a plan, in their order.
        out: Each part gets a folder in here.
        scale: The profile of the studies.
        executor: Where their stages run.
        device: "cpu" or a cuda device.
        minutes: Nothing starts later than this.
        say: Called with a line for every stage.
        after: Called after every part with what became of it and of those before.

    Raises:
        ValueError: No minutes.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    told: list[Told] = []
    for part in parts:
        told.append(Told(part, _try(part, Path(out), scale, executor, device, deadline, say)))
        if told[-1].why is not None:
            say(f"{part.name}: {told[-1].why}")
        if after is not None:
            after(told)
    return told


def _try(
    part: Part,
    out: Path,
    scale: Scale,
    executor: Executor,
    device: str,
    deadline: float | None,
    say: Callable[[str], None],
) -> str | None:
    """Run a part; why it is not done, if it is not."""
    left = None if deadline is None else (deadline - time.monotonic()) / 60
    if left is not None and left <= 0:
        return _LATE
    late = False

    def hear(line: str) -> None:
        nonlocal late
        late = late or line.startswith(_LATE)
        say(f"{part.name}: {line}")

    if (absent := _absent(part)) is not None:
        return absent
    settings = {"device": device, "minutes": left, "progress": False, "say": hear}
    try:
        _RUNS[part.kind](part, out, scale, {**settings, "executor": executor})
    except ImportError as error:
        return f"needs the package {_package(error)}, which is not installed"
    except (ValueError, RuntimeError) as error:
        return f"cannot be run: {' '.join(str(error).split())}"
    failed = len(list((out / part.name).rglob("failures/[!.]*.json")))
    reasons = [_LATE] * late + [f"{failed} stages failed"] * (failed > 0)
    return ", ".join(reasons) or None


def _absent(part: Part) -> str | None:
    """What a part needs that is not there."""
    for name in part.data:
        try:
            load_dataset(name, limit=100)
        except ImportError as error:
            return f"needs the package {_package(error)} for the data set {name}"
        except (ValueError, OSError, RuntimeError):
            # The reason names a folder of this machine, which is for no page.
            return f"needs the data set {name}, which is not in the data folder"
    return None


def _package(error: ImportError) -> str:
    return (error.name or str(error)).partition(".")[0]


def _attacks(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
    config = attack_profile(scale, part.data[0], **part.settings)
    run_attack_study(config, out / part.name, **settings)


def _figure3(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
    preset = "robust" if scale == "paper" else "fast"
    victims = out / str(part.victims)
    scan_victims(victims, out / part.name, preset=preset, **part.settings, **settings)


def _detect(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
    told = dict(part.settings)
    whole = told.get("limit") == 0  # all images, in place of what the data set has on a CPU
    config = detect_preset(part.data[0], told.pop("model"), **told)
    if whole:
        config = replace(config, data=replace(config.data, limit=None))
    run_detect(config, out / part.name, parts=PARTS, **settings)


def _cleaning(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
    config = cleaning_profile(scale, part.data[0], **part.settings)
    victims = None if part.victims is None else out / part.victims
    if victims is not None and not any(victims.glob("records/victim-plain-*.json")):
        victims = None
    run_cleaning(config, out / part.name, victims=victims, **settings)


def _population(part: Part, out: Path, scale: Scale, settings: dict[str, Any]) -> None:
    run_population(population_of(part), out / part.name, **settings)


def population_of(part: Part) -> PopulationConfig:
    """The populations that a part asks for."""
    config = population_profile(part.settings["profile"])
    if part.settings["models"] is None:
        return config
    calibration, test = part.settings["models"]
    worlds = {
        name: replace(world, calibration=calibration, test=test)
        for name, world in config.worlds.items()
    }
    return replace(config, worlds=worlds)


_RUNS = {
    "attacks": _attacks,
    "figure3": _figure3,
    "detect": _detect,
    "cleaning": _cleaning,
    "population": _population,
}

__all__ = ["Told", "population_of", "run_parts"]
