"""``wm-inject stealth``: how visible are the changes to the images of a folder?"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import Parser, add_json, resolve_device, write_results

if TYPE_CHECKING:
    from wm_inject.stealth import Stealth

_UNITS = {"psnr": " dB", "ssim": "", "linf": "", "lpips": ""}
_EPILOG = """examples:
  wm-inject stealth --json stealth.json photos/ poisoned/

Images are compared at the size of their originals. Where poisoning made them smaller, the figures
at the smaller size follow: they leave out what shrinking alone has changed.

What the change is in all images, somebody who has marked images can average out of them, and take
away or forge."""


def add_stealth(parser: Parser) -> None:
    """Give ``parser`` the options of `stealth`."""
    parser.description = "Compare the images of two folders that have the same names."
    parser.epilog = _EPILOG
    parser.add_argument("originals", type=Path, metavar="FOLDER_A", help="the images as they were")
    parser.add_argument("changed", type=Path, metavar="FOLDER_B", help="the poisoned images")
    add_json(parser, "write every pair's values here as JSON")


def run_stealth(args: argparse.Namespace) -> None:
    """Print the figures of all pairs, at both sizes where these differ."""
    from wm_inject.stealth import compare_folders
    from wm_inject.stealth.dependence import DIRECTIONS
    from wm_inject.stealth.perceptual import Lpips, LpipsUnavailable

    device = resolve_device(args.device)
    lpips, reason = None, ""
    try:
        lpips = Lpips().to(device)
    except LpipsUnavailable as error:
        reason = str(error)
    pairs = compare_folders(args.originals, args.changed, lpips=lpips)
    print(f"{len(pairs.files)} pairs of images (mean, lowest, highest)")
    _print_table(pairs, reason)
    results: dict[str, Any] = {"files": list(pairs.files), **_values(pairs)}
    results["sizes"] = [list(map(list, pair)) for pair in pairs.sizes]
    if (alike := pairs.dependence) is not None:
        results["dependence"] = alike._asdict()
        print(
            f"of the change's energy {100 * alike.universal:.1f} % is the same in all images, "
            f"{100 * alike.leading:.1f} % lies in {DIRECTIONS} directions "
            f"({alike.images} changed images at 64 x 64 pixels)"
        )
    if pairs.resized:
        print(f"{resized_line(pairs.resized, len(pairs.files))}; at the changed size:")
        smaller = compare_folders(args.originals, args.changed, lpips=lpips, at="changed")
        _print_table(smaller, reason)
        results["at_changed_size"] = _values(smaller)
    write_results(args, results)


def resized_line(resized: Counter[tuple[tuple[int, int], tuple[int, int]]], images: int) -> str:
    """How many images changed their size, and the commonest three changes.

    Args:
        resized: Width and height before and after, and how many images there are of each.
        images: How many there are in all.
    """
    changes = [
        f"{old[0]} x {old[1]} to {new[0]} x {new[1]} ({count})"
        for (old, new), count in resized.most_common(3)
    ]
    if len(resized) > len(changes):
        changes.append(f"{len(resized) - len(changes)} other changes")
    return f"{resized.total()} of {images} images were resized: {', '.join(changes)} pixels"


def _values(pairs: Stealth) -> dict[str, list[float] | None]:
    rows = {name: getattr(pairs, name) for name in _UNITS}
    return {name: None if row is None else row.tolist() for name, row in rows.items()}


def _print_table(pairs: Stealth, reason: str) -> None:
    """A line a metric; ``reason`` says why LPIPS was not measured."""
    for name, unit in _UNITS.items():
        row = getattr(pairs, name)
        if row is None:
            print(f"{name:6}not measured: {reason}")
        else:
            mean, low, high = float(row.mean()), float(row.min()), float(row.max())
            print(f"{name:6}{mean:9.4f}{low:9.4f}{high:9.4f}{unit}")
