"""How many models a population is to have, kept beside them, and how many were scanned so far."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from wm_eval.attacks.config import CLEAN, TABLE
from wm_eval.attacks.gather import TITLES
from wm_eval.detectors import DETECTORS
from wm_eval.population.config import HALVES, World
from wm_eval.population.counts import Scan
from wm_eval.population.summary import house_first
from wm_eval.records import canonical_json, write_text
from wm_eval.tables import Table

PLAN = "population.json"  # in the folder of each world


def write_plan(folder: Path, world: World) -> None:
    """Keep how many models of each kind a world is to have, in either half."""
    plan = {"calibration": dict(world.calibration), "test": dict(world.test)}
    write_text(folder / PLAN, canonical_json(plan))


def coverage_table(out: str | Path, scans: Sequence[Scan]) -> Table | None:
    """How many of the planned models each detector has scanned; None where no plan was kept.

    Args:
        out: The population's folder.
        scans: Its scans, of `wm_eval.population.summary.read_scans`.
    """
    plans = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(Path(out).glob(f"*/{PLAN}"))
    }
    if not plans:
        return None
    detectors = house_first(scan.values["defence"] for scan in scans)
    done = Counter((s.world, s.values["half"], s.attack, s.values["defence"]) for s in scans)
    rows = [
        (
            world,
            half,
            TITLES.get(attack, attack),
            *(f"{done[world, half, attack, name]} of {planned}" for name in detectors),
        )
        for world, plan in plans.items()
        for half in HALVES
        for attack in (CLEAN, *TABLE)
        if (planned := plan[half].get(attack, 0))
    ]
    titles = (DETECTORS[name].title if name in DETECTORS else name for name in detectors)
    note = "Models scanned, of those planned when the population was last worked on."
    return Table(
        "coverage", "What is done", ("world", "half", "models", *titles), tuple(rows), note
    )


__all__ = ["PLAN", "coverage_table", "write_plan"]
