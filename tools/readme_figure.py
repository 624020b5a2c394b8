"""Draw the README's picture from the pictures of a demo run.

For example: ``python tools/readme_figure.py runs/demo docs/demo.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from wm_eval.records import read_record
from wm_inject.command.common import run_cli

ZOOM, GAP, LINE = 4, 8, 18  # pixels per image pixel, between pictures, per line of text


def draw(study: Path) -> Image.Image:
    """The study's images: original, poisoned, the change amplified, and the mark read back."""
    found = read_record(study / "records" / "watermark.json").values["pictures"]
    columns = {
        "original": "original",
        "poisoned": "poisoned",
        "residual": f"change x {found['gain']}",
        "extracted": "read from poisoned",
        "extracted-clean": "read from original",
    }
    side = found["watermark"]["size"][0] * ZOOM
    step = side + GAP
    size = (len(columns) * step + GAP, LINE + GAP + len(found["rows"]) * step)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (kind, title) in enumerate(columns.items()):
        left = GAP + column * step
        pen.text((left, 2), title, fill="black", font=font)
        for row, pictures in enumerate(found["rows"]):
            picture = Image.open(study / "pictures" / pictures[kind]["file"]).convert("RGB")
            large = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (left, LINE + GAP + row * step))
    return sheet


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="readme_figure", description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a demo run")
    parser.add_argument("out", type=Path, help="the PNG to write")
    args = parser.parse_args(argv)
    draw(args.study).save(args.out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
