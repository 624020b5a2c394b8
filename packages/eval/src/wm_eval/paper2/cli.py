"""The commands ``detect`` (the reverse-generator paper's experiment) and ``figure3``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_eval.cli_settings import asked_seeds, listed, named_in, numbers
from wm_eval.executor_options import add_executor, chosen_executor
from wm_inject.command.common import resolve_device
from wm_inject.command.config import layered, print_config, read_config

if TYPE_CHECKING:
    from wm_eval.paper2.config import DetectConfig

DETECT_HELP = "the reverse-generator paper's experiment: detect and clean, seed by seed"
FIGURE3_HELP = "Neural Cleanse's index for every victim of a study of attacks"
DETECT_EPILOG = """\
examples:
  wm-eval detect --data mnist --out runs/detect-mnist
  wm-eval detect --data cifar10 --arch vgg16 --width 16 --seeds 3 --out runs/detect-vgg16
  wm-eval detect --data mnist --print-config > mine.toml
  wm-eval detect --config mine.toml --seeds 3 --out runs/mine
  wm-eval detect --data mnist --detectors reverse,reverse-lpips --seeds 1 --out runs/lpips

It can be stopped at any time, and the same command goes on. Tables go to OUT/tables, figures to
OUT/figures; a stage that fails says why in OUT/failures, and the others go on.
"""
FIGURE3_EPILOG = """\
examples:
  wm-eval figure3 --victims runs/small-cifar10
"""


def add_detect(parser: argparse.ArgumentParser) -> None:
    """Give the parser of ``detect`` its arguments."""
    parser.add_argument(
        "--data", help="mnist, cifar10, gtsrb, digits, a folder or an .npz (default: mnist)"
    )
    parser.add_argument(
        "--arch",
        help="wanet-mnist, preactresnet18, vgg16, mobilenetv2, resnet10 ... (default: the data's)",
    )
    parser.add_argument("--width", type=int, help="channels of its first stage")
    parser.add_argument("--attack", help="any of table1's (default: wanet)")
    parser.add_argument("--limit", type=int, help="training images (default: the data's)")
    parser.add_argument("--epochs", type=int, help="of every victim (default: the data's)")
    parser.add_argument("--seeds", type=int, help="how many, from --seed (default: 10)")
    parser.add_argument(
        "--detectors",
        type=listed,
        help="nc,reverse,reverse-lpips,feature-re,bti-dbf or some of them (default: nc,reverse)",
    )
    parser.add_argument("--preset", help="of every detector (default: fast)")
    parser.add_argument("--images", type=int, help="of the defender (default: 1%% or the paper's)")
    parser.add_argument("--shares", type=numbers, help="to clean with (default: 0.01,0.03,0.05)")
    parser.add_argument(
        "--methods", type=listed, help="fine-tuning, nad and detectors (default: without nad)"
    )
    parser.add_argument(
        "--parts",
        type=listed,
        default=("detection", "cleaning", "pictures"),
        help="detection,cleaning,pictures,rates (default: all but rates)",
    )
    parser.add_argument("--minutes", type=float, help="start nothing new after so many minutes")
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    add_executor(parser)


def detect_command(args: argparse.Namespace) -> int:
    """Run ``detect``: what is missing of the experiment, then tables and figures."""
    from wm_eval.paper2.figures import write_figures
    from wm_eval.paper2.run import run_detect
    from wm_eval.paper2.summary import summarise_detection
    from wm_eval.paper2.tables import write_tables
    from wm_eval.records import read_records

    config = _config(args)
    if args.print_config:
        return print_config(config)
    device = str(resolve_device(args.device))
    records = run_detect(
        config,
        args.out,
        device=device,
        minutes=args.minutes,
        executor=chosen_executor(args, device=device),
        parts=args.parts,
    )
    found = read_records(records)
    if any(name.startswith("scan-") for name in found):
        for row in summarise_detection(found):
            print(_line(row))
        for path in write_tables(args.out):
            print(f"table       {path}")
        figures = write_figures(args.out)
        for path in figures.drawn:
            print(f"figure      {path}")
        for reason in figures.skipped:
            print(f"skipped     {reason}")
    else:
        print("nothing scanned yet: the same command goes on")
    print(f"records     {records}")
    failed = len(list((args.out / "failures").glob("*.json")))
    if failed:
        print(f"failures    {args.out / 'failures'} ({failed} stages, each with its reason)")
    return 0


@dataclass(frozen=True)
class IndexSettings:
    """How ``wm-eval figure3`` scans the victims of a study.

    Args:
        detector: A name out of `wm_eval.detectors.DETECTORS`.
        preset: Of the detector.
        images: Clean images of the defender.
    """

    detector: str = "nc"
    preset: str = "fast"
    images: int = 500


def add_figure3(parser: argparse.ArgumentParser) -> None:
    """Give the parser of ``figure3`` its arguments."""
    parser.add_argument(
        "--victims", type=Path, required=True, help="the folder of a study of attacks (table1)"
    )
    parser.add_argument("--out", type=Path, help="default: VICTIMS/figure3")
    parser.add_argument("--detector", help="default: nc")
    parser.add_argument("--preset", help="of the detector (default: fast)")
    parser.add_argument("--images", type=int, help="of the defender (default: 500)")
    parser.add_argument("--minutes", type=float, help="start no scan after so many minutes")
    add_executor(parser)


def figure3_command(args: argparse.Namespace) -> int:
    """Run ``figure3``: scan what is missing, then draw."""
    from wm_eval.paper2.index_figure import write_index_figure
    from wm_eval.paper2.index_scans import scan_victims

    names = ("detector", "preset", "images")
    given = {name: getattr(args, name) for name in names}
    settings = layered(args, IndexSettings(), read_config(args), given)
    if args.print_config:
        return print_config(settings)
    out = args.out or args.victims / "figure3"
    device = str(resolve_device(args.device))
    records = scan_victims(
        args.victims,
        out,
        name=settings.detector,
        preset=settings.preset,
        images=settings.images,
        device=device,
        minutes=args.minutes,
        executor=chosen_executor(args, device=device),
    )
    if any(records.glob("scan-*.json")):
        for path in write_index_figure(out):
            print(f"figure3     {path}")
    else:
        print("nothing scanned yet: the same command goes on")
    print(f"records     {records}")
    return 0


def _config(args: argparse.Namespace) -> DetectConfig:
    from wm_eval.paper2.config import detect_preset

    file = read_config(args)
    start = detect_preset(
        args.data or named_in(file, "data", "name") or "mnist",
        args.arch or named_in(file, "victim", "model"),
        width=args.width,
        limit=args.limit,
    )
    given = {
        "data": {"name": args.data, "limit": args.limit},
        "victim": {"model": args.arch, "width": args.width},
        "train": {"epochs": args.epochs},
        "cleaning_shares": args.shares,
    }
    names = ("attack", "detectors", "preset", "images", "methods")
    given |= {name: getattr(args, name) for name in names}
    config = layered(args, start, file, given)
    return replace(config, seeds=asked_seeds(args, config.seeds))


def _line(row: dict[str, Any]) -> str:
    index = "infinite" if row["paper_index_mean"] is None else f"{row['paper_index_mean']:.2f}"
    return (
        f"{row['defence']:13} on {row['attack']:11} target named in {row['named_target']} of "
        f"{row['n']}, another label in {row['named_other']}; paper's rule: "
        f"{row['paper_named_target']}, {row['paper_named_other']} (mean index {index})"
    )


__all__ = [
    "DETECT_EPILOG",
    "DETECT_HELP",
    "FIGURE3_EPILOG",
    "FIGURE3_HELP",
    "IndexSettings",
    "add_detect",
    "add_figure3",
    "detect_command",
    "figure3_command",
]
