"""The command line: studies (``demo``, ``run``, ``report``) and the field's tables (``table1``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_eval.__about__ import __version__
from wm_eval.audit.cli import (
    CLEAN_EPILOG,
    CLEAN_HELP,
    INSPECT_EPILOG,
    INSPECT_HELP,
    SCAN_EPILOG,
    SCAN_HELP,
    add_clean,
    add_inspect,
    add_scan,
    clean_command,
    inspect_command,
    scan_command,
)
from wm_eval.cleaning.cli import MITIGATE_EPILOG, MITIGATE_HELP, add_mitigate, mitigate_command
from wm_eval.cli_settings import asked_seeds, listed, named_in
from wm_eval.executor_options import add_executor, chosen_executor
from wm_eval.paper2.cli import (
    DETECT_EPILOG,
    DETECT_HELP,
    FIGURE3_EPILOG,
    FIGURE3_HELP,
    add_detect,
    add_figure3,
    detect_command,
    figure3_command,
)
from wm_eval.population.cli import (
    POPULATION_EPILOG,
    POPULATION_HELP,
    add_population,
    population_command,
)
from wm_inject.command.common import (
    Parser,
    add_common,
    add_completion,
    describe,
    resolve_device,
    run_cli,
)
from wm_inject.command.config import (
    add_config,
    add_print_config,
    layered,
    print_config,
    read_config,
    refuse_preset,
)

if TYPE_CHECKING:
    from wm_eval.attacks.config import AttackStudyConfig
    from wm_eval.experiment import StudyResult

_EPILOG = """\
examples:
  wm-eval demo                                plant, find and remove a backdoor in minutes
  wm-eval demo --pretrained                   the same, sooner: the watermark is trained already
  wm-eval run study.toml --out runs/cifar10   a study of your own, or the rest of it
  wm-eval detect --out runs/detection         the reverse-generator paper's experiment on MNIST
  wm-eval population --profile tiny           error rates of both defences, on many small models
  wm-eval mitigate --data cifar10             what cleaning leaves of a backdoor
  wm-eval report runs/cifar10                 draw the page of a study anew
  wm-eval scan model.onnx --images clean/     is a stranger's model backdoored?
  wm-eval table1 --profile tiny --data digits every attack under every corruption, in minutes
"""
_TABLE_EPILOG = """\
examples:
  wm-eval {name} --data cifar10 --attacks badnets,wanet --minutes 60
  wm-eval {name} --profile tiny --data digits --print-config > mine.toml
  wm-eval {name} --config mine.toml --out runs/mine

It can be stopped at any time, and the same command goes on; three commands with one --out share
what they have in common. An attack that fails says why in OUT/failures, and the others go on.
"""
# What each command measures, what its records are called, and what its help says of it.
_TABLES = {
    "table1": ("cells", "cell", "attacks x corruptions: accuracy, attack success, false triggers"),
    "table2": ("stealth", "stealth", "attacks x PSNR, SSIM, LPIPS"),
    "figure1": ("figure", "figure", "the attacks' pictures side by side"),
}
# The commands whose settings --config reads and --print-config prints.
_CONFIGURED = (*_TABLES, "detect", "population", "mitigate", "figure3", "scan", "clean")
# What the commands about defences are: help, epilog, arguments, work.
_DEFENCES = {
    "detect": (DETECT_HELP, DETECT_EPILOG, add_detect, detect_command),
    "population": (POPULATION_HELP, POPULATION_EPILOG, add_population, population_command),
    "mitigate": (MITIGATE_HELP, MITIGATE_EPILOG, add_mitigate, mitigate_command),
    "figure3": (FIGURE3_HELP, FIGURE3_EPILOG, add_figure3, figure3_command),
    "scan": (SCAN_HELP, SCAN_EPILOG, add_scan, scan_command),
    "clean": (CLEAN_HELP, CLEAN_EPILOG, add_clean, clean_command),
    "inspect": (INSPECT_HELP, INSPECT_EPILOG, add_inspect, inspect_command),
}
_DEMO_EPILOG = """\
examples:
  wm-eval demo --pretrained
  wm-eval demo --print-config > study.toml      all settings, for "wm-eval run"
"""
_REPORT_EPILOG = """\
examples:
  wm-eval report runs/demo
  wm-eval report --without-images runs/cifar10
"""
_RUN_EPILOG = """\
examples:
  wm-eval run study.toml --out runs/narrow
  wm-eval run study.toml --print-config > whole.toml

A study.toml:
  preset = "cifar10"          # start from a study that ships: demo or cifar10
  name = "narrow"

  [data]
  name = "photos"             # a data set by name, a folder of class folders, or an .npz

  [victim]
  width = 32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of ``wm-eval``; the exit code is 0, 1 for an error, 64 for wrong usage."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="wm-eval",
        description="Measure backdoor attacks and defences: studies, tables, reports.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"wm-eval {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="the whole story on real digits, in minutes", epilog=_DEMO_EPILOG
    )
    demo.add_argument("--out", type=Path, help="default: runs/demo, or runs/demo-pretrained")
    demo.add_argument(
        "--pretrained", action="store_true", help="start from a watermark that ships: sooner done"
    )
    add_print_config(demo)
    run = commands.add_parser(
        "run", help="run a study from a TOML file, or the rest of it", epilog=_RUN_EPILOG
    )
    run.add_argument("config", type=Path, metavar="STUDY.toml", help="the study's settings")
    run.add_argument("--out", type=Path, required=True, help="the study's folder")
    add_print_config(run)
    report = commands.add_parser(
        "report", help="draw report.html and tables.md anew", epilog=_REPORT_EPILOG
    )
    report.add_argument("folder", type=Path, metavar="FOLDER", help="the study's folder")
    report.add_argument(
        "--without-images",
        action="store_true",
        help="leave out images of the data set, where they may not be passed on",
    )
    for name, (_, _, told) in _TABLES.items():
        _add_table(commands.add_parser(name, help=told, epilog=_TABLE_EPILOG.format(name=name)))
    for name, (told, epilog, add, _) in _DEFENCES.items():
        add(commands.add_parser(name, help=told, epilog=epilog))
    for name, command in commands.choices.items():
        add_common(command, version=__version__)
        if name in _CONFIGURED:
            add_config(command)
        if command in (run, report):
            command.set_defaults(seed=None)
    describe(commands)
    given = parser.parse_args(argv)
    work: dict[str, Callable[[argparse.Namespace], int]]
    work = {"report": _report, **dict.fromkeys(_TABLES, _table)}
    work |= {name: run for name, (_, _, _, run) in _DEFENCES.items()}
    return work.get(given.command, _study)(given)


def _add_table(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", choices=("tiny", "small", "paper"), help="default: small")
    command.add_argument(
        "--data",
        help="cifar10, gtsrb, imagenet10, mnist, digits, a folder or an .npz (default: cifar10)",
    )
    command.add_argument("--out", type=Path, help="default: runs/PROFILE-DATA")
    command.add_argument("--attacks", type=listed, help="which, as a,b (default: the profile's)")
    command.add_argument("--seeds", type=int, help="how many, from --seed (default: the profile's)")
    command.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    command.add_argument(
        "--recipes", type=listed, help="plain,corrupted or one of them (default: plain)"
    )
    add_executor(command)


def _table(given: argparse.Namespace) -> int:
    from wm_eval.attacks.run import run_attack_study

    config = _table_config(given)
    if given.print_config:
        return print_config(config)
    out = given.out or Path("runs") / f"{config.profile}-{Path(config.data.name).stem}"
    device = str(resolve_device(given.device))
    records = run_attack_study(
        config,
        out,
        device=device,
        minutes=given.minutes,
        executor=chosen_executor(given, device=device),
        parts=(_TABLES[given.command][0],),
    )
    shown = _drawn(given.command, out)
    for path in shown:
        print(f"{given.command:11} {path}")
    if not shown:
        print(f"{given.command:11} nothing measured yet: the same command goes on")
    print(f"records     {records}")
    failed = len(list((out / "failures").glob("*.json")))
    if failed:
        print(f"failures    {out / 'failures'} ({failed} stages, each with its reason)")
    return 0


def _table_config(given: argparse.Namespace) -> AttackStudyConfig:
    from wm_eval.attacks.profiles import attack_profile

    file = read_config(given)
    refuse_preset(given, "profile", "profile", file)
    profile: Any = given.profile or named_in(file, "profile") or "small"
    start = attack_profile(profile, given.data or named_in(file, "data", "name") or "cifar10")
    changes = {name: getattr(given, name) for name in ("attacks", "recipes")}
    config = layered(given, start, file, {**changes, "data": {"name": given.data}})
    return replace(config, seeds=asked_seeds(given, config.seeds))


def _drawn(command: str, out: Path) -> list[Path]:
    """Render what has been measured by now; the files of this command."""
    _, kind, _ = _TABLES[command]
    measured = any((out / "records").glob(f"{kind}-*.json"))
    if command == "figure1" and measured:
        from wm_eval.attacks.figure import draw_figure

        return [draw_figure(out)]
    if not measured and not any((out / "failures").glob("*.json")):
        return []
    from wm_eval.attacks.tables import write_tables

    return [path for path in write_tables(out) if path.name.startswith(command)]


def _study(given: argparse.Namespace) -> int:
    # Imported here: torch takes seconds, and --help should not.
    from wm_eval.config import StudyConfig
    from wm_eval.experiment import load_study, run_study
    from wm_eval.presets import study_preset

    if given.command == "demo":
        preset = "demo-pretrained" if given.pretrained else "demo"
        config = replace(study_preset(preset), seed=given.seed)
    elif given.config is None:  # only to be printed
        config = StudyConfig(seed=given.seed or 0)
    else:
        config = load_study(given.config, seed=given.seed)
    if given.print_config:
        return print_config(config)
    out = given.out or Path("runs") / config.name
    result = run_study(config, out, device=str(resolve_device(given.device)))
    _tell(result)
    return 0


def _tell(result: StudyResult) -> None:
    from wm_eval.summary import headline, story

    for line in story(result.records):
        print(line)
    print()
    for sentence in headline(result.records):
        print(sentence)
    print(f"report      {result.report}")


def _report(given: argparse.Namespace) -> int:
    from wm_eval.records import write_text
    from wm_eval.report import render_report
    from wm_eval.tables import render_markdown

    tables = given.folder / "tables.md"
    page = render_report(given.folder, dataset_images=not given.without_images)
    write_text(tables, render_markdown(given.folder / "records"))
    print(f"report      {page}\ntables      {tables}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
