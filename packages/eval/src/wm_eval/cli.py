"""The command line: studies (``run``, ``demo``, ``tables``, ``page``) and audits of one model."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wm_eval.__about__ import __version__
from wm_eval.audit.cli import add_audit
from wm_inject.command.common import CommandLine, resolve_device
from wm_inject.command.config import add_print_config, print_config
from wm_inject.command.values import output_file, output_folder, positive, within

if TYPE_CHECKING:
    from wm_eval.executors import Executor

_EPILOG = """\
examples:
  wm-eval demo                          plant, find and remove a backdoor in minutes
  wm-eval demo --pretrained             the same with a pretrained watermark, in less time
  wm-eval run attacks-digits-tiny       every attack under every corruption, in minutes
  wm-eval run study.toml --minutes 60   a study of your own, or the rest of it
  wm-eval tables runs/demo              render the tables of a study again
  wm-eval scan model.onnx --images clean/
"""
_DEMO_EPILOG = """\
examples:
  wm-eval demo --pretrained
  wm-eval demo --print-config > study.toml      all settings, for "wm-eval run"
"""
_RUN_EPILOG = """\
examples:
  wm-eval run attacks-cifar10 --minutes 60
  wm-eval run detection-mnist --workers 8 --out runs/detection
  wm-eval run mitigation-cifar10 --set seeds=[1] --set defender.fractions=[0.05]
  wm-eval run study.toml --print-config > whole.toml

A study.toml:
  base = "story-cifar10"      # start from a study that ships
  name = "narrow"

  [data]
  name = "photos"             # a data set by name, a folder of class folders, or an .npz

  [victim]
  width = 32

It can be stopped at any time, and the same command goes on from there. Studies with one --out share
what they have in common. The exit code is 1 if a stage failed; OUT/failures.jsonl says why.

studies that ship:
"""
_TABLES_EPILOG = """\
examples:
  wm-eval tables runs/attacks-cifar10 --formats md,csv,tex
  wm-eval tables runs/population --calibrate calibration.json
  wm-eval tables runs/mine --calibrate calibration.json --beside runs/population-audit
"""
_PAGE_EPILOG = """\
examples:
  wm-eval page runs/attacks-cifar10
  wm-eval page runs/demo --without-images
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of ``wm-eval``; the exit code is 0, 1 for an error, 64 for wrong usage."""
    line = CommandLine(
        "wm-eval",
        __version__,
        description="Measure backdoor attacks and defences: studies, tables, pages, audits.",
        epilog=_EPILOG,
    )
    demo = line.add("demo", _run, "the whole story on real digits, in minutes", epilog=_DEMO_EPILOG)
    demo.add_argument(
        "--pretrained", action="store_true", help="use a watermark that ships: sooner done"
    )
    epilog = _RUN_EPILOG + "".join(f"  {name}\n" for name in shipped_names())
    run = line.add("run", _run, "run a study, or the rest of it", epilog=epilog)
    run.add_argument("study", metavar="STUDY", help="the name of one that ships, or a TOML file")
    for command in (demo, run):
        _add_run(command)
    tables = line.add("tables", _tables, "render the tables of a study", epilog=_TABLES_EPILOG)
    tables.add_argument("folder", type=Path, metavar="FOLDER", help="the study's folder")
    tables.add_argument(
        "--formats", type=formats, default="md,csv", help="out of md,csv,html,tex (default: md,csv)"
    )
    tables.add_argument(
        "--calibrate",
        type=output_file,
        metavar="FILE",
        help="write the null distributions of a population here, as JSON",
    )
    tables.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="another population, whose clean models join those of --calibrate; may be repeated",
    )
    page = line.add("page", _page, "draw the figures and the page of a study", epilog=_PAGE_EPILOG)
    page.add_argument("folder", type=Path, metavar="FOLDER", help="the study's folder")
    page.add_argument(
        "--without-images",
        action="store_true",
        help="leave out images of the data set, where they may not be passed on",
    )
    add_audit(line)
    return line.main(argv)


def shipped_names() -> list[str]:
    """The names of the studies that ship."""
    return sorted(path.stem for path in (Path(__file__).parent / "studies").glob("*.toml"))


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=output_folder, help="the study's folder (default: runs/NAME)"
    )
    command.add_argument("--minutes", type=positive, help="start nothing new after so many minutes")
    command.add_argument(
        "--set",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as train.epochs=4; may be repeated",
    )
    add_print_config(command)
    add_executor(command)


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--workers``, ``--ray`` and ``--gpus-per-task``."""
    group = parser.add_argument_group("where stages run")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=within(int, "[1, 1024]"),
        default=1,
        metavar="N",
        help="on so many processes of one thread each (default: 1, this process)",
    )
    where.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="as Ray tasks, on the cluster at ADDRESS or on this machine (needs ray)",
    )
    group.add_argument(
        "--gpus-per-task",
        type=positive,
        metavar="SHARE",
        help="of a GPU for each Ray task, as 0.25 (default: 1 with --device cuda, else 0)",
    )


def executor_of(args: argparse.Namespace, *, device: str) -> Executor:
    """The executor that the options ask for.

    Raises:
        ValueError: Fewer workers than 1, a share of a GPU that is none or that is not for Ray, or
            Ray tasks that compute on a GPU and are given none.
    """
    from wm_eval.executors import HERE
    from wm_eval.local_processes import LocalProcesses
    from wm_eval.ray_tasks import RayTasks

    share = args.gpus_per_task
    if args.ray is None:
        if share is not None:
            raise ValueError("expected --gpus-per-task together with --ray")
        # An impossible count is refused there.
        return HERE if args.workers == 1 else LocalProcesses(args.workers)
    on_gpu = device != "cpu"
    share = float(on_gpu) if share is None else share
    if on_gpu and not share > 0:
        raise ValueError(f"expected --gpus-per-task above 0 with --device cuda, got {share:g}")
    return RayTasks(args.ray, share)


def _run(args: argparse.Namespace) -> int:
    from wm_eval.config import Study, load_study
    from wm_eval.engine import run
    from wm_eval.pages import write_page, write_tables
    from wm_eval.records import read_study
    from wm_eval.study import study_stages

    name = args.study if args.command == "run" else "demo"
    if args.command == "demo" and args.pretrained:
        name = "demo-pretrained"
    if name is None:  # only to be printed
        return print_config(Study(attacks=("clean",)))
    study = load_study(name, seed=args.seed, changes="\n".join(args.set))
    if args.print_config:
        return print_config(study)
    out = args.out or Path("runs") / study.name
    device = str(resolve_device(args.device))
    outcome = run(
        study_stages(study),
        out,
        device=device,
        minutes=args.minutes,
        executor=executor_of(args, device=device),
    )
    try:
        for path in write_tables(out):
            print(f"table       {path}")
        print(f"page        {write_page(out)}")
    except ValueError as error:
        print(f"no tables yet: {error}")  # what is done is kept all the same
    if outcome.failures:
        print(f"failures    {out / 'failures.jsonl'} ({len(outcome.failures)} stages)")
    if "mark" in study.parts and outcome.complete:
        from wm_eval.pages.report import render_report
        from wm_eval.pages.story_text import headline, story_lines

        records = read_study(out)
        print("\n".join([*story_lines(records), "", *headline(records)]))
        print(f"report      {render_report(out)}")
    return 1 if outcome.failures else 0


def setting(text: str) -> str:
    """An `argparse` type: KEY=VALUE as a line of TOML; a value that is no TOML is a string.

    Examples:
        >>> setting("data.name=digits")
        'data.name = "digits"'
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        value = json.dumps(value)
    return f"{key} = {value}"


def formats(text: str) -> tuple[str, ...]:
    """An `argparse` type: formats of tables, as a,b."""
    from wm_eval.render import FORMATS

    names = tuple(text.split(","))
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"expected formats out of {','.join(FORMATS)}")
    return names


def _tables(args: argparse.Namespace) -> int:
    from wm_eval.pages import write_tables

    if args.beside and args.calibrate is None:
        raise ValueError("expected --beside together with --calibrate")
    for path in write_tables(args.folder, args.formats):
        print(f"table       {path}")
    if args.calibrate is not None:
        from defense_nc.verdict.calibration import write_calibrations
        from wm_eval.population import calibrations_of

        write_calibrations(args.calibrate, calibrations_of(args.folder, *args.beside))
        print(f"calibration {args.calibrate}")
    return 0


def _page(args: argparse.Namespace) -> int:
    from wm_eval.pages import write_page
    from wm_eval.pages.report import render_report
    from wm_eval.records import RECORDS, read_study

    print(f"page        {write_page(args.folder)}")
    if (args.folder / RECORDS).is_file() and read_study(args.folder).select(kind="mark"):
        report = render_report(args.folder, dataset_images=not args.without_images)
        print(f"report      {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
