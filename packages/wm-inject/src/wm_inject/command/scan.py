"""``wm-inject scan``: which images of a folder do exported detectors flag? No torch needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from wm_inject.command.common import Parser, add_json, write_results
from wm_inject.command.values import BATCH
from wm_inject.core.text import escape

_EPILOG = """examples:
  wm-inject scan --detector detector.onnx incoming/
  wm-inject scan --detector mark.onnx --detector filter.onnx --json found.json incoming/

"wm-extract export" writes detectors of a watermark, "--filter" of both defences' scans one of
images that act like a reversed trigger. Each file holds its threshold and the rate of false alarms
that the threshold was chosen for."""


def add_scan(parser: Parser) -> None:
    """Give ``parser`` the options of `scan`."""
    parser.description = "Flag the images of a folder that exported detectors hold to be triggered."
    parser.epilog = _EPILOG
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument(
        "--detector",
        type=Path,
        action="append",
        required=True,
        metavar="FILE.onnx",
        help="an exported detector; may be given several times",
    )
    add_json(parser, "write every image's scores here as JSON")
    parser.add_argument("--batch-size", type=BATCH, default=64, help="images at once (default: 64)")


def run_scan(args: argparse.Namespace) -> None:
    """Scan the folder and print a line for every image that is flagged or cannot be read."""
    from wm_inject import runtime
    from wm_inject.core.image_files import LeftOut, describe, find_images, refuse_unread
    from wm_inject.core.labelled_folder import listed

    scanner = runtime.Scanner(*args.detector, providers=runtime.providers_for(args.device))
    files = find_images(args.images)
    rows = list(scanner.folder(files, batch_size=args.batch_size))
    for row in rows:
        scores = "  ".join(f"{name} {value:.3g}" for name, value in row.scores.items())
        if row.error is not None:
            print(f"unread   {escape(row.file)}: {row.error}")
        elif row.flagged:
            print(f"flagged  {escape(row.file)}  {scores}")
    unread_files = [LeftOut(row.file, row.error) for row in rows if row.error is not None]
    unread = len(unread_files)
    flagged = sum(row.flagged for row in rows)
    rate = f"false-positive rate at most {scanner.false_positive_rate:g}"
    print(f"{flagged} of {len(rows) - unread} images flagged ({rate}), {unread} unread")
    if files.left_out:
        print(f"not looked at: {describe(files.left_out)}")
    detectors = {
        name: {
            "looks_for": detector.looks_for,
            "threshold": detector.threshold,
            "false_positive_rate": detector.false_positive_rate,
        }
        for name, detector in scanner.detectors.items()
    }
    images = [row._asdict() | {"file": escape(row.file)} for row in rows]
    results = {"detectors": detectors, "images": images, "left_out": listed(files.left_out)}
    write_results(args, results)
    refuse_unread(unread_files, len(rows), skip=True)
