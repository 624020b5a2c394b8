"""The ``defense-reverse`` command: scan a classifier with reversed generators, and clean one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense_nc.scan_cli import (
    ScanSettings,
    add_inputs,
    add_outputs,
    open_inputs,
    report_table,
    scan_settings,
    verdict_code,
    write_cleaned,
    write_outputs,
)
from defense_reverse.__about__ import __version__
from defense_reverse.config import PRESETS
from wm_inject.command.common import (
    Parser,
    add_common,
    add_completion,
    describe,
    run_cli,
    write_found,
)
from wm_inject.command.config import add_config, print_config, take_over

if TYPE_CHECKING:
    from torch import nn

    from defense_nc import ScanReport
    from wm_victim.datasets import ImageSet

_EPILOG = """\
examples:
  defense-reverse scan victim.safetensors --data mnist --json scan.json
  defense-reverse scan --preset robust --print-config > mine.toml
  defense-reverse scan victim.safetensors --data mnist --config mine.toml
  defense-reverse clean victim.safetensors --data mnist --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
`clean` exits with 0 when it wrote a cleaned classifier, and with 1 when it did not.
"""


@dataclass(frozen=True)
class CleanSettings:
    """What ``defense-reverse clean`` does with a classifier.

    Args:
        scan: The settings of the search, `ReverseConfig`.
        unlearning: How its generators are unlearned, `defense_nc.Unlearning`.
        images: Clean images to scan with.
        clean_images: Images to clean with; 5 % of the training set if None.
        alpha: Share of clean models that may be accused, in (0, 1).
        max_ratio: Accuse only below this share of the median, in (0, 1].
        seed: Of every draw.
    """

    scan: Any
    unlearning: Any
    images: int = 500
    clean_images: int | None = None
    alpha: float = 0.05
    max_ratio: float = 0.5
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `clean` 0, or 1 if not cleaned."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "clean":
        return _clean(args)
    return verdict_code(lambda: _scan(args))


def _parser() -> Parser:
    parser = Parser(
        prog="defense-reverse",
        description="Look for a backdoor with dynamic or invisible triggers in an image "
        "classifier: one reversed generator per label. Clean the label that a scan names.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"defense-reverse {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser("scan", help="is there a backdoor?", epilog=_EPILOG)
    add_inputs(scan, presets=tuple(PRESETS))
    scan.add_argument(
        "--checkpoint",
        type=Path,
        help="keep the state here; a scan that was killed goes on from it",
    )
    scan.add_argument("--triggers", type=Path, help="also write the generators to this folder")
    add_outputs(scan)
    add_common(scan, version=__version__)
    add_config(scan)
    clean = commands.add_parser("clean", help="clean the label that a scan names", epilog=_EPILOG)
    add_inputs(clean, presets=tuple(PRESETS))
    clean.add_argument(
        "--clean-images", type=int, help="images to clean with (default: 5%% of the training set)"
    )
    clean.add_argument(
        "--recipe", choices=("nc", "paper", "reverse"), help="of unlearning (default: reverse)"
    )
    clean.add_argument("--out", type=Path, required=True, help="the cleaned classifier's file")
    add_common(clean, version=__version__)
    add_config(clean)
    describe(commands)
    return parser


def _report(args: argparse.Namespace, model: nn.Module, known: ImageSet) -> ScanReport:
    from defense_reverse.scan import scan

    report = scan(
        model,
        known.images,
        labels=known.labels,
        config=args.scan,
        alpha=args.alpha,
        max_ratio=args.max_ratio,
        seed=args.seed,
        checkpoint=getattr(args, "checkpoint", None),
    )
    print(report_table(report))
    return report


def _scan(args: argparse.Namespace) -> ScanReport | None:
    from defense_reverse.config import ReverseConfig
    from defense_reverse.trigger import ReversedTrigger, save_reversed

    start = ScanSettings(ReverseConfig.preset("fast"))
    more = {"filter_rate": args.filter_rate}
    settings = scan_settings(args, start, more, scan=ReverseConfig.preset)
    if args.print_config:
        print_config(settings)
        return None
    take_over(args, settings)
    model, data, known = open_inputs(args)
    report = _report(args, model, known)
    about = {"classifier": args.classifier.name, "data": data.name, "preset": args.scan.name}
    about["fingerprint"] = data.fingerprint
    write_found(args, report.to_dict() | about)
    if args.triggers is not None:
        for label, trigger in report.triggers.items():
            assert isinstance(trigger, ReversedTrigger)
            save_reversed(trigger, args.triggers / f"label-{label}.safetensors", about)
    for line in write_outputs(args, report, model, known):
        print(line)
    return report


def _clean(args: argparse.Namespace) -> int:
    from defense_nc import Unlearning
    from defense_reverse.config import ReverseConfig
    from wm_victim.datasets import defender_subset

    start = CleanSettings(ReverseConfig.preset("fast"), Unlearning.preset("reverse"))
    presets: dict[str, Any] = {"scan": ReverseConfig.preset, "unlearning": Unlearning.preset}
    settings = scan_settings(args, start, {"clean_images": args.clean_images}, **presets)
    if args.print_config:
        return print_config(settings)
    take_over(args, settings)
    model, data, known = open_inputs(args)
    report = _report(args, model, known)
    if not report.suspected:
        raise ValueError(f"not cleaned, the verdict is {report.verdict.value}: {report.reason}")
    device = next(model.parameters()).device
    count = args.clean_images or max(2, len(data.train) // 20)
    mine = defender_subset(data.train, count=count, seed=args.seed).to(device)
    cleaned: nn.Module = model
    triggers = {label: report.triggers[label].to(device) for label in report.suspected}
    for label, trigger in triggers.items():
        cleaned = args.unlearning.repair(
            *(cleaned, mine.images, mine.labels),
            triggers={label: trigger},
            seed=args.seed,
            progress=True,
        ).model
    about = {"cleaned": list(triggers), "images": count, "seed": args.seed}
    about |= {"recipe": asdict(args.unlearning)}
    models = model, cleaned
    for line in write_cleaned(args, models, triggers, data, about, report=report, what="generator"):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
