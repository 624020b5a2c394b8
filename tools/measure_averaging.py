"""What averaging takes of the marks that ship, and forges with it.

``python tools/measure_averaging.py --out runs/averaging`` attacks each pair of RGB images of 32
pixels with images of CIFAR-10: a thousand test images are attacked, the attacker knows others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wm_eval.engine import Result, Stage, Store, run
from wm_extract import MarkDetector, attack_by_averaging
from wm_inject import PRETRAINED, WatermarkTrigger, pretrained_card, quantize
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_inject.stealth import image_dependence
from wm_victim import load_dataset

DATA, ATTACKED, KNOWN = "cifar10", 1000, 5000
COUNTS = (1, 10, 100, 1000, 5000)


def measure(name: str, _: Store, __: Path) -> Result:
    """Of a pair that ships."""
    trigger, detector = WatermarkTrigger.from_pretrained(name), MarkDetector.from_pretrained(name)
    return Result(averaging_values(trigger, detector))


def averaging_values(trigger: WatermarkTrigger, detector: MarkDetector) -> dict[str, Any]:
    """Both attacks on a pair, and how much of its change is the same for all images."""
    data = load_dataset(DATA)
    clean, originals = quantize(data.test.images)[: ATTACKED + KNOWN].split([ATTACKED, KNOWN])
    others = quantize(data.train.images[:KNOWN])
    with torch.no_grad():
        marked, seen = (
            torch.cat([quantize(trigger(part)) for part in group.split(250)])
            for group in (clean, originals)
        )
    attack = partial(attack_by_averaging, detector, marked, clean, seen_marked=seen, counts=COUNTS)
    return {
        "n": ATTACKED,
        "found": float(detector.detect(marked).marked.float().mean()),
        "taken": float(detector.detect(clean).marked.float().mean()),
        "dependence": image_dependence(marked - clean)._asdict(),
        "blind": [row._asdict() for row in attack(seen_clean=others)],
        "pairs": [row._asdict() for row in attack(seen_clean=originals)],
    }


def stages() -> Iterator[Stage]:
    """One stage for each pair that ships and knows such images."""
    digest = load_dataset(DATA).fingerprint
    for name in PRETRAINED:
        card = pretrained_card(name)
        if (card["channels"], card["image_size"]) == (3, 32):
            settings = {"sha256": card["sha256"], "counts": list(COUNTS), "attacked": ATTACKED}
            work = partial(measure, name)
            yield Stage("averaging", {"weights": name}, work, settings, (), digest)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="measure_averaging", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for records")
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    return 0 if run(stages(), args.out, device=str(resolve_device(args.device))).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
