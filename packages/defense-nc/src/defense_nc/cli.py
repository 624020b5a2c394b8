"""The ``defense-nc`` command: scan a classifier with Neural Cleanse, and clean one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from defense_nc.__about__ import __version__
from defense_nc.scan_cli import (
    add_inputs,
    add_outputs,
    open_inputs,
    report_table,
    verdict_code,
    write_outputs,
)
from wm_inject.cli_common import Parser, add_common, add_completion, run_cli

if TYPE_CHECKING:
    from torch import nn

    from defense_nc.report import ScanReport
    from wm_victim import ImageSet

_EPILOG = """\
examples:
  defense-nc scan victim.safetensors --data digits --json scan.json
  defense-nc scan victim.safetensors --data digits --filter filter.onnx
  defense-nc unlearn victim.safetensors --data digits --label 0 --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
"""


_PRESETS = ("paper", "ports", "robust", "reference", "fast")  # spelled out: --help needs no torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `unlearn` 0, or 1 after an error."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "unlearn":
        return _unlearn(args)
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
    add_inputs(scan, presets=_PRESETS, images=500)
    scan.add_argument("--json", type=Path, help="also write the report here")
    add_outputs(scan)
    scan.add_argument(
        "--checkpoint", type=Path, help="keep the state here, and go on from it after a stop"
    )
    add_common(scan, version=__version__)
    unlearn = commands.add_parser("unlearn", help="clean a label that a scan names", epilog=_EPILOG)
    add_inputs(unlearn, presets=_PRESETS, images=500)
    unlearn.add_argument("--label", type=int, help="clean this label (default: all named)")
    unlearn.add_argument("--force", action="store_true", help="clean --label without a scan")
    unlearn.add_argument(
        "--recipe", choices=("nc", "paper", "reverse"), default="nc", help="(default: nc)"
    )
    unlearn.add_argument("--out", type=Path, required=True, help="the cleaned classifier's file")
    add_common(unlearn, version=__version__)
    return parser


def _report(
    args: argparse.Namespace,
    model: nn.Module,
    known: ImageSet,
    checkpoint: Path | None = None,
) -> ScanReport:
    from defense_nc.scan import scan
    from defense_nc.schedule import NCConfig

    return scan(
        model,
        known.images,
        labels=known.labels,
        config=NCConfig.preset(args.preset),
        alpha=args.alpha,
        max_ratio=args.max_ratio,
        seed=args.seed,
        checkpoint=checkpoint,
    )


def _scan(args: argparse.Namespace) -> ScanReport:
    from wm_inject.files import write_json

    model, data, known = open_inputs(args)
    report = _report(args, model, known, args.checkpoint)
    if args.json is not None:
        about = {"classifier": args.classifier.name, "data": data.name, "preset": args.preset}
        write_json(args.json, report.to_dict() | about | {"fingerprint": data.fingerprint})
    print(report_table(report))
    for line in write_outputs(args, report, model, known):
        print(line)
    return report


def _unlearn(args: argparse.Namespace) -> int:
    from defense_nc.unlearn import UnlearnConfig, unlearn
    from wm_victim import accuracy, attack_success, save_classifier

    model, data, known = open_inputs(args)
    test = data.test.to(known.images.device)
    cleaned: nn.Module = model
    triggers = _triggers(args, model, known)
    config = UnlearnConfig.preset(args.recipe)
    for trigger in triggers.values():
        cleaned = unlearn(
            cleaned,
            trigger,
            known.images,
            known.labels,
            config=config,
            seed=args.seed,
            progress=True,
        )
    about = {"cleaned": sorted(triggers), "recipe": asdict(config), "seed": args.seed}
    save_classifier(cleaned.cpu(), args.out, {**about, "fingerprint": data.fingerprint})
    cleaned.to(known.images.device)
    print(f"accuracy {accuracy(model, test):.4f} -> {accuracy(cleaned, test):.4f}")
    for label, trigger in triggers.items():
        before, after = (
            attack_success(net, test, trigger, target=label) for net in (model, cleaned)
        )
        print(f"reversed trigger of label {label}: success {before:.4f} -> {after:.4f}")
    print(f"wrote {args.out}")
    return 0


def _triggers(args: argparse.Namespace, model: nn.Module, known: ImageSet) -> dict[int, nn.Module]:
    """The reversed triggers to unlearn: of the labels that a scan names, unless forced."""
    from defense_nc.inversion import invert_trigger
    from defense_nc.schedule import NCConfig

    if args.force:
        if args.label is None:
            raise ValueError("expected --label with --force")
        found = invert_trigger(
            model,
            known.images,
            args.label,
            labels=known.labels,
            config=NCConfig.preset(args.preset),
            seed=args.seed,
            progress=True,
        )
        return {args.label: found}
    report = _report(args, model, known)
    print(report_table(report))
    wanted = report.suspected if args.label is None else (args.label,)
    if not wanted or not set(wanted) <= set(report.suspected):
        what = "no label" if args.label is None else f"not label {args.label}"
        raise ValueError(f"not cleaned: the scan named {what} (--force cleans --label regardless)")
    device = known.images.device
    return {label: report.triggers[label].to(device) for label in wanted}
