"""Everything in both papers, in order of value, as far as the time goes; the same command goes on.

For example ``python tools/reproduce.py --profile tiny --minutes 30 --out runs/tiny --workers 2``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wm_eval import __version__
from wm_eval.cli import add_executor, executor_of
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli

_EPILOG = """\
examples:
  python tools/reproduce.py --profile tiny --minutes 30 --out runs/tiny --workers 2
  python tools/reproduce.py --profile small --only attacks --out runs/small
  python tools/reproduce.py --profile paper --ray auto --gpus-per-task 0.5 --out /shared/paper

OUT/README.md is written anew after every study. Data sets are looked for in the folder that WM_DATA
names; nothing is downloaded. Stages always run in processes of one thread each, so that records
are the same for any number of workers.
"""


class Part(NamedTuple):
    """A study that ships, and the folder that it goes to: victims in one folder are shared."""

    study: str
    folder: str

    @property
    def kind(self) -> str:
        """Attacks, detection, mitigation or population."""
        return self.study.partition("-")[0]


def _plan(*studies: str) -> tuple[Part, ...]:
    return tuple(Part(name, name.replace("mitigation-", "attacks-")) for name in studies)


PLANS = {
    "tiny": _plan(
        "attacks-digits-tiny", "detection-digits-tiny", "mitigation-digits-tiny", "population-tiny"
    ),
    "small": _plan(
        "attacks-cifar10",
        "attacks-mnist",
        "detection-mnist",
        "detection-gtsrb-vgg16",
        "mitigation-cifar10",
        "mitigation-gtsrb",
        "population",
    ),
    "paper": _plan(
        *(f"attacks-{data}-paper" for data in ("cifar10", "gtsrb", "imagenet10")),
        "detection-mnist-paper",
        *(
            f"detection-{data}-{model}-paper"
            for data in ("cifar10", "gtsrb")
            for model in ("preactresnet18", "vgg16")
        ),
        *(f"mitigation-{data}-paper" for data in ("cifar10", "gtsrb", "mnist")),
        "population",
    ),
}


def run_parts(
    parts: Sequence[Part],
    out: Path,
    *,
    data: str | None = None,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> dict[str, str]:
    """Run every study, or the rest of it, and write the page after each.

    Args:
        parts: Of a plan, in their order.
        out: The folder of all of them.
        data: A data set in place of the studies' own.
        minutes: Nothing starts later than this.
        say: Called with a line for every stage.
        settings: What `wm_eval.run` takes beside these.

    Returns:
        By study: "done", or why it is missing or unfinished.

    Raises:
        ValueError: No minutes.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"expected minutes > 0, got {minutes}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    status: dict[str, str] = {}
    for part in parts:
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        status[part.study] = "out of time"
        if left is None or left > 0:
            status[part.study] = _run(part, out, data, minutes=left, say=say, **settings)
        say(f"{part.study}: {status[part.study]}")
        write_readme(out, status)
    return status


def _run(part: Part, out: Path, data: str | None, **settings: Any) -> str:
    """Run a study; what became of it."""
    from wm_eval.config import load_study
    from wm_eval.engine import run
    from wm_eval.study import study_stages

    changes = "" if data is None else f'data.name = "{data}"\ndata.limit = 2000'
    study = load_study(part.study, changes=changes)
    names = [setting.data.name for setting in study.settings.values()] or [study.data.name]
    if (absent := _absent(names)) is not None:
        return absent
    try:
        outcome = run(study_stages(study), out / part.folder, progress=False, **settings)
    except ImportError as error:
        return f"needs the package {_package(error)}, which is not installed"
    except (ValueError, RuntimeError) as error:
        return f"cannot be run: {' '.join(str(error).split())}"
    reasons = ["out of time"] if outcome.late else []
    reasons += [f"{len(outcome.failures)} stages failed"] if outcome.failures else []
    return ", ".join(reasons) or "done"


def _absent(names: Sequence[str]) -> str | None:
    """What data sets need that is not there."""
    from wm_victim import load_dataset

    for name in dict.fromkeys(names):
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


def write_readme(out: Path, status: Mapping[str, str]) -> Path:
    """Write ``OUT/README.md``: what became of every study, and the pages of those with records."""
    from wm_eval.pages import write_page
    from wm_inject.core.files import write_text

    head = ["# Both papers, as far as they were run here", "", "| study | status |", "|---|---|"]
    head += [f"| {name} | {reason} |" for name, reason in status.items()]
    try:
        body = write_page(out).read_text(encoding="utf-8").partition("\n")[2]
    except (ValueError, ImportError) as error:
        body = f"\nNo page yet: {' '.join(str(error).split())}\n"
    write_text(out / "README.md", "\n".join(head) + "\n" + body)
    return out / "README.md"


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="reproduce", description=__doc__.splitlines()[0], epilog=_EPILOG)
    parser.add_argument("--profile", choices=tuple(PLANS), default="tiny")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all studies")
    parser.add_argument(
        "--only", help="attacks,detection,mitigation,population, or names of studies (default: all)"
    )
    parser.add_argument("--data", help="of the profile tiny, in place of the bundled digits")
    add_executor(parser)
    add_common(parser, version=__version__)
    args = parser.parse_args(argv)
    from wm_eval.executors import HERE
    from wm_eval.local_processes import LocalProcesses

    parts = PLANS[args.profile]
    if args.data is not None:
        if args.profile != "tiny":
            raise ValueError(f"expected --data with the profile tiny alone, got {args.profile}")
        parts = tuple(part for part in parts if part.kind != "population")
    if args.only is not None:
        names = set(args.only.split(","))
        if unknown := sorted(names - {name for part in parts for name in (part.study, part.kind)}):
            known = ", ".join(part.study for part in parts)
            raise ValueError(f"expected studies out of {known}, got {unknown[0]}")
        parts = tuple(part for part in parts if {part.study, part.kind} & names)
    device = str(resolve_device(args.device))
    executor = executor_of(args, device=device)
    status = run_parts(
        parts,
        args.out,
        data=args.data,
        minutes=args.minutes,
        device=device,
        executor=LocalProcesses(1) if executor == HERE else executor,
        say=lambda line: print(line, file=sys.stderr),
    )
    for name, reason in status.items():
        print(f"{name:36} {reason}")
    print(f"{'page':36} {args.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
