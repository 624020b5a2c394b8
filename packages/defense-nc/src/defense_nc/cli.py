"""The ``defense-nc`` command: scan a classifier with Neural Cleanse, and clean one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense_nc.__about__ import __version__
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

    from defense_nc.verdict.report import ScanReport
    from wm_victim import ImageSet

_EPILOG = """\
examples:
  defense-nc scan victim.safetensors --data digits --json scan.json
  defense-nc scan victim.safetensors --data digits --filter filter.onnx
  defense-nc scan --preset robust --print-config > mine.toml
  defense-nc scan victim.safetensors --data digits --config mine.toml
  defense-nc clean victim.safetensors --data digits --label 0 --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
`clean` exits with 0 when it wrote a cleaned classifier, and with 1 when it did not.
"""


@dataclass(frozen=True)
class CleanSettings:
    """What ``defense-nc clean`` does with a classifier.

    Args:
        scan: The settings of the search, `NCConfig`.
        unlearning: How its triggers are unlearned, `Unlearning`.
        images: Clean images to scan and to clean with.
        alpha: Share of clean models that may be accused, in (0, 1).
        max_ratio: Accuse only below this share of the median, in (0, 1].
        seed: Of every draw.
    """

    scan: Any
    unlearning: Any
    images: int = 500
    alpha: float = 0.05
    max_ratio: float = 0.5
    seed: int = 0


_PRESETS = ("paper", "ports", "robust", "reference", "fast")  # spelled out: --help needs no torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `clean` 0, or 1 if not cleaned."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command != "scan":
        return _clean(args)
    return verdict_code(lambda: _scan(args))


def _parser() -> Parser:
    parser = Parser(
        prog="defense-nc",
        description="Look for a backdoor in an image classifier with Neural Cleanse, and clean it.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"defense-nc {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser("scan", help="is there a backdoor?", epilog=_EPILOG)
    add_inputs(scan, presets=_PRESETS)
    add_outputs(scan)
    scan.add_argument(
        "--checkpoint", type=Path, help="keep the state here, and go on from it after a stop"
    )
    add_common(scan, version=__version__)
    add_config(scan)
    # "unlearn" is what the paper calls it; "clean" is what the other commands call it.
    clean = commands.add_parser(
        "clean", aliases=["unlearn"], help="clean a label that a scan names", epilog=_EPILOG
    )
    add_inputs(clean, presets=_PRESETS)
    clean.add_argument("--label", type=int, help="clean this label (default: all named)")
    clean.add_argument("--force", action="store_true", help="clean --label without a scan")
    clean.add_argument(
        "--recipe", choices=("nc", "paper", "reverse"), help="of unlearning (default: nc)"
    )
    clean.add_argument("--out", type=Path, required=True, help="the cleaned classifier's file")
    add_common(clean, version=__version__)
    add_config(clean)
    describe(commands)
    return parser


def _report(
    args: argparse.Namespace,
    model: nn.Module,
    known: ImageSet,
    checkpoint: Path | None = None,
) -> ScanReport:
    from defense_nc.neural_cleanse import NeuralCleanse

    detector = NeuralCleanse(args.scan, args.alpha, args.max_ratio)
    return detector.scan(
        model, known.images, labels=known.labels, seed=args.seed, checkpoint=checkpoint
    )


def _scan(args: argparse.Namespace) -> ScanReport | None:
    from defense_nc.schedule import NCConfig

    start = ScanSettings(NCConfig.preset("fast"))
    more = {"filter_rate": args.filter_rate}
    settings = scan_settings(args, start, more, scan=NCConfig.preset)
    if args.print_config:
        print_config(settings)
        return None
    take_over(args, settings)
    model, data, known = open_inputs(args)
    report = _report(args, model, known, args.checkpoint)
    about = {"classifier": args.classifier.name, "data": data.name, "preset": args.scan.name}
    write_found(args, report.to_dict() | about | {"fingerprint": data.fingerprint})
    print(report_table(report))
    for line in write_outputs(args, report, model, known):
        print(line)
    return report


def _clean(args: argparse.Namespace) -> int:
    from defense_nc.schedule import NCConfig
    from defense_nc.unlearning import Unlearning

    start = CleanSettings(NCConfig.preset("fast"), Unlearning.preset("nc"))
    presets: dict[str, Any] = {"scan": NCConfig.preset, "unlearning": Unlearning.preset}
    settings = scan_settings(args, start, {}, **presets)
    if args.print_config:
        return print_config(settings)
    take_over(args, settings)
    model, data, known = open_inputs(args)
    cleaned: nn.Module = model
    report = None if args.force else _named(args, model, known)
    triggers = _triggers(args, model, known, report)
    for label, trigger in triggers.items():
        cleaned = args.unlearning.repair(
            *(cleaned, known.images, known.labels),
            triggers={label: trigger},
            seed=args.seed,
            progress=True,
        ).model
    about = {"cleaned": sorted(triggers), "recipe": asdict(args.unlearning), "seed": args.seed}
    models = model, cleaned
    for line in write_cleaned(args, models, triggers, data, about, report=report, what="trigger"):
        print(line)
    return 0


def _named(args: argparse.Namespace, model: nn.Module, known: ImageSet) -> ScanReport:
    """Scan, and refuse to go on unless the scan names what shall be cleaned."""
    report = _report(args, model, known)
    print(report_table(report))
    wanted = report.suspected if args.label is None else (args.label,)
    if not wanted or not set(wanted) <= set(report.suspected):
        what = "no label" if args.label is None else f"not label {args.label}"
        raise ValueError(f"not cleaned: the scan named {what} (--force cleans --label regardless)")
    return report


def _triggers(
    args: argparse.Namespace, model: nn.Module, known: ImageSet, report: ScanReport | None
) -> dict[int, nn.Module]:
    """The reversed triggers to unlearn: of the labels that a scan names, unless forced."""
    from defense_nc.inversion import invert_trigger

    if report is not None:
        wanted = report.suspected if args.label is None else (args.label,)
        device = known.images.device
        return {label: report.triggers[label].to(device) for label in wanted}
    if args.label is None:
        raise ValueError("expected --label with --force")
    found = invert_trigger(
        model,
        known.images,
        args.label,
        labels=known.labels,
        config=args.scan,
        seed=args.seed,
        progress=True,
    )
    return {args.label: found}
