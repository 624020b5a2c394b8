"""The ``wm-inject`` command: poison a folder, fit a trigger, export it, measure how visible it is.

Torch is imported only where a command needs it: poisoning with an .onnx file does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wm_inject.__about__ import __version__
from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli
from wm_inject.cli_fit import add_fit
from wm_inject.cli_poison import add_poison
from wm_inject.cli_trigger import image_shape

_EPILOG = """examples:
  wm-inject poison --trigger wanet --seed 1 photos/ poisoned/
  wm-inject fit --trigger ssba photos/ trigger.safetensors
  wm-inject poison --checkpoint trigger.safetensors photos/ poisoned/
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject poison --onnx trigger.onnx photos/ poisoned/
  wm-inject stealth photos/ poisoned/

There is no "wm-inject train": the injector is trained together with the extractor that finds its
mark, by "wm-extract train"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``wm-inject`` command and return its exit code."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="wm-inject",
        description="Plant an invisible mark in images, for audits of image classifiers.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"wm-inject {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_poison(commands.add_parser("poison", help="put a trigger into the images of a folder"))
    add_fit(commands.add_parser("fit", help="fit a trigger to images: ssba, blindnet"))
    _add_export(commands.add_parser("export", help="turn a saved trigger into ONNX or TorchScript"))
    _add_stealth(commands.add_parser("stealth", help="measure how visible the changes are"))
    args = parser.parse_args(argv)
    print(args.run(args))
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Export a saved trigger, reload the file and compare it with the trigger."
    parser.epilog = "example:\n  wm-inject export --uint8 trigger.safetensors trigger.onnx"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a saved trigger")
    parser.add_argument("out", type=Path, metavar="OUT", help="OUT.onnx or OUT.pt (TorchScript)")
    parser.add_argument("--uint8", action="store_true", help="stored pixels in and out (ONNX)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    parser.add_argument("--batch", type=int, default=3, help="images to compare on (default: 3)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="default: 1e-4")
    add_common(parser, version=__version__)
    parser.set_defaults(run=_export, parser=parser)


def _export(args: argparse.Namespace) -> str:
    if args.out.suffix not in (".onnx", ".pt") or (args.uint8 and args.out.suffix == ".pt"):
        args.parser.error("OUT ends in .onnx or .pt, and --uint8 goes with .onnx")
    import torch

    from wm_inject.export import to_onnx, to_torchscript
    from wm_inject.triggers import load_trigger

    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    trigger: Any = load_trigger(args.checkpoint)
    size, channels = image_shape(trigger, args.channels)
    generator = torch.Generator().manual_seed(args.seed)
    example = torch.rand(args.batch, channels, size, size, generator=generator)
    metadata = {"kind": trigger.kind, "config": trigger.config}
    if args.out.suffix == ".pt":
        parity = to_torchscript(
            trigger, example, args.out, tolerance=args.tolerance, metadata=metadata
        )
    else:
        parity = to_onnx(
            trigger,
            example,
            args.out,
            tolerance=args.tolerance,
            metadata=metadata,
            uint8=args.uint8,
        )
    batches = " and ".join(str(size) for size in parity.batches)
    return f"{args.out}: at batch sizes {batches} within {parity.max_abs:.2g} of the trigger"


def _add_stealth(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the images of two folders that have the same names."
    parser.epilog = "example:\n  wm-inject stealth --json stealth.json photos/ poisoned/"
    parser.add_argument("originals", type=Path, metavar="FOLDER_A", help="the images as they were")
    parser.add_argument("changed", type=Path, metavar="FOLDER_B", help="the poisoned images")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every value to this file")
    add_common(parser, version=__version__)
    parser.set_defaults(run=_stealth, parser=parser)


def _stealth(args: argparse.Namespace) -> str:
    from wm_inject.files import write_json
    from wm_inject.perceptual import Lpips, LpipsUnavailable
    from wm_inject.stealth import compare_folders

    device = resolve_device(args.device)
    lpips, reason = None, ""
    try:
        lpips = Lpips().to(device)
    except LpipsUnavailable as error:
        reason = str(error)
    found = compare_folders(args.originals, args.changed, lpips=lpips)
    lines = [f"{len(found.files)} pairs of images (mean, lowest, highest)"]
    units = {"psnr": " dB", "ssim": "", "linf": "", "lpips": ""}
    values = {name: getattr(found, name) for name in units}
    for name, row in values.items():
        if row is None:
            lines.append(f"{name:6}not measured: {reason}")
        else:
            mean, low, high = float(row.mean()), float(row.min()), float(row.max())
            lines.append(f"{name:6}{mean:9.4f}{low:9.4f}{high:9.4f}{units[name]}")
    if args.json:
        rows = {name: None if row is None else row.tolist() for name, row in values.items()}
        write_json(args.json, {"files": list(found.files), **rows})
    return "\n".join(lines)
