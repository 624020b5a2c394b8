"""Everything in both papers, in order of value, as far as the time goes; the same command goes on.

For example ``python tools/reproduce.py --profile tiny --minutes 30 --out runs/tiny --workers 2``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from wm_eval import __version__
from wm_eval.executor_options import add_executor, chosen_executor
from wm_eval.executors import HERE
from wm_eval.local_processes import LocalProcesses
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli

_EPILOG = """\
examples:
  python tools/reproduce.py --profile tiny --minutes 30 --out runs/tiny --workers 2
  python tools/reproduce.py --profile small --only attacks,figure3 --out runs/small
  python tools/reproduce.py --profile paper --ray auto --gpus-per-task 0.5 --out /shared/paper

OUT/README.md is written anew after every part. Data sets are looked for in the folder that WM_DATA
names; nothing is downloaded. Stages always run in processes of one thread each, so that records
are the same for any number of workers.
"""


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="reproduce", description=__doc__.splitlines()[0], epilog=_EPILOG)
    parser.add_argument("--profile", choices=("tiny", "small", "paper"), default="tiny")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all studies")
    parser.add_argument(
        "--only",
        type=_names,
        help="attacks,figure3,detect,cleaning,population, or names of folders (default: all)",
    )
    parser.add_argument("--data", help="of the profile tiny, in place of the bundled digits")
    add_executor(parser)
    add_common(parser, version=__version__)
    given = parser.parse_args(argv)

    from wm_eval.reproduce.page import write_readme
    from wm_eval.reproduce.plan import plan_of
    from wm_eval.reproduce.run import run_parts

    device = str(resolve_device(given.device))
    executor = chosen_executor(given, device=device)
    plan = plan_of(given.profile, given.data)
    parts = plan.parts() if given.only is None else plan.only(given.only)
    told = run_parts(
        parts,
        given.out,
        scale=given.profile,
        executor=LocalProcesses(1) if executor == HERE else executor,
        device=device,
        minutes=given.minutes,
        say=lambda line: print(line, file=sys.stderr),
        after=lambda told: write_readme(given.out, given.profile, told),
    )
    for each in told:
        print(f"{each.part.name:20} {each.why or 'done'}")
    print(f"{'page':20} {given.out / 'README.md'}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(run_cli(_main))
