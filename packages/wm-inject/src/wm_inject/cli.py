"""The ``wm-inject`` command: poison a folder, fit a trigger, export it, measure how visible it is.

Torch is imported only where a command needs it: poisoning with an .onnx file does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wm_inject.__about__ import __version__
from wm_inject.command.common import CommandLine, Parser, add_json, resolve_device, write_results
from wm_inject.command.export import add_export, export_trigger
from wm_inject.command.fit import add_fit, run_fit
from wm_inject.command.poison import add_poison, run_poison
from wm_inject.command.scan import add_scan, run_scan
from wm_inject.command.serve import add_serve, run_serve

_EPILOG = """examples:
  wm-inject poison --pretrained tiny-32 photos/ poisoned/
  wm-inject poison --trigger wanet --seed 1 photos/ poisoned/
  wm-inject fit --trigger ssba photos/ trigger.safetensors
  wm-inject poison --checkpoint trigger.safetensors photos/ poisoned/
  wm-inject export --uint8 --pretrained tiny-32 trigger.onnx
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject poison --onnx trigger.onnx photos/ poisoned/
  wm-inject stealth photos/ poisoned/
  wm-inject scan --detector detector.onnx incoming/
  wm-inject serve --model mark=trigger.onnx

There is no "wm-inject train": the injector is trained together with the extractor that finds its
mark, by "wm-extract train"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``wm-inject`` command and return its exit code."""
    command = CommandLine(
        "wm-inject",
        __version__,
        description="Plant an invisible mark in images, for audits of image classifiers.",
        epilog=_EPILOG,
    )
    add_poison(command.add("poison", run_poison, "put a trigger into the images of a folder"))
    add_fit(command.add("fit", run_fit, "fit a trigger to images: ssba, blindnet"))
    add_export(
        command.add("export", export_trigger, "turn a saved trigger into ONNX or TorchScript")
    )
    _add_stealth(command.add("stealth", _stealth, "measure how visible the changes are"))
    add_scan(command.add("scan", run_scan, "flag images with exported detectors"))
    add_serve(command.add("serve", run_serve, "answer for exported models over HTTP"))
    return command.main(argv)


def _add_stealth(parser: Parser) -> None:
    parser.description = "Compare the images of two folders that have the same names."
    parser.epilog = "examples:\n  wm-inject stealth --json stealth.json photos/ poisoned/"
    parser.add_argument("originals", type=Path, metavar="FOLDER_A", help="the images as they were")
    parser.add_argument("changed", type=Path, metavar="FOLDER_B", help="the poisoned images")
    add_json(parser, "write every pair's values here as JSON")


def _stealth(args: argparse.Namespace) -> None:
    from wm_inject.stealth import compare_folders
    from wm_inject.stealth.perceptual import Lpips, LpipsUnavailable

    device = resolve_device(args.device)
    lpips, reason = None, ""
    try:
        lpips = Lpips().to(device)
    except LpipsUnavailable as error:
        reason = str(error)
    pairs = compare_folders(args.originals, args.changed, lpips=lpips)
    units = {"psnr": " dB", "ssim": "", "linf": "", "lpips": ""}
    values = {name: getattr(pairs, name) for name in units}
    print(f"{len(pairs.files)} pairs of images (mean, lowest, highest)")
    for name, row in values.items():
        if row is None:
            print(f"{name:6}not measured: {reason}")
        else:
            mean, low, high = float(row.mean()), float(row.min()), float(row.max())
            print(f"{name:6}{mean:9.4f}{low:9.4f}{high:9.4f}{units[name]}")
    rows = {name: None if row is None else row.tolist() for name, row in values.items()}
    write_results(args, {"files": list(pairs.files), **rows})
