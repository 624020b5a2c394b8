"""The command ``wm-eval mitigate``: what mitigations leave of a backdoor, and what they cost."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_eval.cli_settings import asked_seeds, listed, named_in, numbers
from wm_eval.executor_options import add_executor, chosen_executor
from wm_inject.command.config import layered, print_config, read_config, refuse_preset

if TYPE_CHECKING:
    from wm_eval.cleaning.config import CleaningConfig

MITIGATE_HELP = "methods x attacks: accuracy, attack success and DER before and after cleaning"
MITIGATE_EPILOG = """\
examples:
  wm-eval mitigate --profile tiny --data digits     all methods on digits, in minutes
  wm-eval mitigate --data mnist --attacks clean,wanet --shares 0.01 --out runs/small-mnist
  wm-eval mitigate --profile tiny --data digits --print-config > mine.toml

--out may be the folder of `wm-eval table1`: victims that are there are used. It can be stopped at
any time, and the same command goes on. What fails says why in OUT/failures; the rest goes on.
"""


def add_mitigate(command: argparse.ArgumentParser) -> None:
    """Give the parser of ``wm-eval mitigate`` its options.

    Args:
        command: The parser, without the options that every command has.
    """
    command.add_argument("--profile", choices=("tiny", "small", "paper"), help="default: small")
    command.add_argument(
        "--data",
        help="cifar10, gtsrb, imagenet10, mnist, digits, a folder or an .npz (default: cifar10)",
    )
    command.add_argument("--out", type=Path, help="default: runs/PROFILE-DATA")
    command.add_argument(
        "--victims", type=Path, help="copy victims from this folder of `wm-eval table1` first"
    )
    command.add_argument(
        "--attacks", type=listed, help="which, as a,b; clean is the clean victim (default: some)"
    )
    command.add_argument("--methods", type=listed, help="which, as a,b (default: all)")
    command.add_argument(
        "--shares", type=numbers, help="shares of clean training images, as 0.01,0.05"
    )
    command.add_argument("--steps", type=int, help="optimiser steps of every method")
    command.add_argument("--seeds", type=int, help="how many, from --seed (default: the profile's)")
    command.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    command.add_argument(
        "--no-rescan", action="store_true", help="do not scan again what unlearning has cleaned"
    )
    add_executor(command)


def mitigate_command(given: argparse.Namespace) -> int:
    """Run ``wm-eval mitigate``.

    Args:
        given: What `add_mitigate` and the common options parsed.

    Returns:
        The exit code.

    Raises:
        ValueError: Settings that do not fit.
    """
    from wm_eval.cleaning.gather import read_cleaning
    from wm_eval.cleaning.run import run_cleaning
    from wm_eval.cleaning.tables import cleaning_headlines, write_cleaning_tables
    from wm_inject.command.common import resolve_device

    config = mitigate_config(given)
    if given.print_config:
        return print_config(config)
    study = config.study
    out = given.out or Path("runs") / f"{study.profile}-{Path(study.data.name).stem}"
    device = str(resolve_device(given.device))
    records = run_cleaning(
        config,
        out,
        victims=given.victims,
        device=device,
        minutes=given.minutes,
        executor=chosen_executor(given, device=device),
    )
    if (records / "cleaning.json").is_file():
        paths = write_cleaning_tables(out)
        for line in cleaning_headlines(read_cleaning(out)):
            print(line)
        for path in paths:
            print(f"mitigate    {path}")
    else:
        print("mitigate    nothing measured yet: the same command goes on")
    print(f"records     {records}")
    failed = len(list((out / "failures").glob("*.json")))
    if failed:
        print(f"failures    {out / 'failures'} ({failed} stages, each with its reason)")
    return 0


def mitigate_config(given: argparse.Namespace) -> CleaningConfig:
    """The settings that the options ask for.

    Raises:
        ValueError: Settings that do not fit.
    """
    from wm_eval.cleaning.profiles import cleaning_profile

    file = read_config(given)
    study = file.get("study")
    refuse_preset(given, "profile", "profile", study if isinstance(study, dict) else {})
    profile: Any = given.profile or named_in(file, "study", "profile") or "small"
    data = given.data or named_in(file, "study", "data", "name") or "cifar10"
    changes = {name: getattr(given, name) for name in ("methods", "shares", "steps")}
    changes["rescan"] = False if given.no_rescan else None
    changes["study"] = {"attacks": given.attacks, "data": {"name": given.data}}
    config = layered(given, cleaning_profile(profile, data), file, changes)
    seeds = asked_seeds(given, config.study.seeds)
    return replace(config, study=replace(config.study, seeds=seeds))


__all__ = ["MITIGATE_EPILOG", "MITIGATE_HELP", "add_mitigate", "mitigate_command"]
