"""The ``wm-eval population`` command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from wm_eval.cli_settings import listed
from wm_eval.executor_options import add_executor, chosen_executor
from wm_inject.command.config import layered, print_config, read_config, refuse_preset

if TYPE_CHECKING:
    from wm_eval.population.config import PopulationConfig

POPULATION_HELP = "error rates of detectors on many small classifiers, clean and backdoored"
POPULATION_EPILOG = """\
examples:
  wm-eval population --profile tiny --out runs/population      minutes, on bundled digits
  wm-eval population --worlds mnist-plain --minutes 60         one world
  wm-eval population --workers 8                               eight models at a time
  wm-eval population --profile tiny --print-config > mine.toml
  wm-eval population --only-tables --calibrate calibration.json

It can be stopped at any time, and the same command goes on.
"""


def add_population(command: argparse.ArgumentParser) -> None:
    """Give a parser what ``wm-eval population`` takes."""
    command.add_argument("--profile", choices=("tiny", "small"), help="default: small")
    command.add_argument("--out", type=Path, help="default: runs/population-PROFILE, or -FILE")
    command.add_argument("--worlds", type=listed, help="which, as a,b (default: all)")
    command.add_argument("--detectors", type=listed, help="default: nc,reverse")
    command.add_argument("--preset", help="of the detectors (default: fast)")
    command.add_argument("--half", choices=("calibration", "test"), help="only this half")
    command.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    command.add_argument("--only-train", action="store_true", help="train, and scan nothing")
    command.add_argument("--only-tables", action="store_true", help="render what is there")
    command.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="write the null distributions here, as JSON"
    )
    add_executor(command)


def population_command(given: argparse.Namespace) -> int:
    """Run ``wm-eval population``."""
    from wm_eval.population.config import HALVES
    from wm_eval.population.run import run_population
    from wm_eval.population.tables import write_population
    from wm_inject.command.common import resolve_device

    config = _config(given)
    if given.print_config:
        return print_config(config)
    name = (given.profile or "small") if given.config is None else given.config.stem
    out = given.out or Path("runs") / f"population-{name}"
    if not given.only_tables:
        device = str(resolve_device(given.device))
        run_population(
            config,
            out,
            worlds=given.worlds,
            halves=(given.half,) if given.half else HALVES,
            scans=not given.only_train,
            device=device,
            minutes=given.minutes,
            executor=chosen_executor(given, device=device),
        )
    if given.only_train:
        return 0
    try:
        paths = write_population(out, floor=config.floor, alpha=config.alpha)
    except ValueError as error:
        if given.only_tables:
            raise
        print(f"no tables yet: {error}")  # what was trained and scanned is kept all the same
        return 0
    for path in paths:
        print(f"table       {path}")
    if given.calibrate is not None:
        from defense_nc.verdict.calibration import write_calibrations
        from wm_eval.population.summary import read_scans, summarise

        found = summarise(read_scans(out))
        given.calibrate.parent.mkdir(parents=True, exist_ok=True)
        write_calibrations(given.calibrate, found.calibrations.values())
        print(f"calibration {given.calibrate}")
    return 0


def _config(given: argparse.Namespace) -> PopulationConfig:
    from wm_eval.population.config import population_profile

    file = read_config(given)
    refuse_preset(given, "profile", "worlds", file)
    config = layered(given, population_profile(given.profile or "small"), file, {})
    names = given.detectors or tuple(config.detectors)
    presets = {name: given.preset or config.detectors.get(name, "fast") for name in names}
    return layered(given, config, {}, {"detectors": presets})


__all__ = ["POPULATION_EPILOG", "POPULATION_HELP", "add_population", "population_command"]
