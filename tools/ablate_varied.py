"""What each part of the recipe of `varied-32` is worth: pairs that differ from it in one thing.

``python tools/ablate_varied.py --out results/ablation-injector`` trains them as the pair that
ships, a quarter of an hour each on one core, and measures them on the same test images.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wm_eval.config import plain
from wm_eval.engine import Result, Stage, Store, run
from wm_extract import JointConfig, MarkDetector, UNetExtractor, train_jointly
from wm_inject import ViTInjector, WatermarkTrigger, quantize
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli

# Run as a script, Python would look for `tools` inside tools/.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.measure_averaging import averaging_values
from tools.train_weights import PAIRS, measure_on, training_images

PAIR = PAIRS["varied-32"]


def variants() -> dict[str, JointConfig]:
    """The recipes that are compared, by name."""
    return {
        "varied-32": PAIR.config,
        "no-forgery-loss": replace(PAIR.config, forgery_weight=0.0),
        "no-diversity-loss": replace(PAIR.config, diversity_weight=0.0),
        "no-subtraction": replace(PAIR.config, subtraction=0.0),
        "jpeg-and-crops": replace(PAIR.config, jpeg=75, crop=0.8),
    }


def train_and_measure(
    config: JointConfig, images: Tensor, kept: Tensor, seed: int, store: Store, checkpoint: Path
) -> Result:
    """One variant: train it, choose its threshold, and measure what a pair that ships is asked."""
    assert PAIR.start is not None
    start = ViTInjector.from_pretrained(PAIR.start), UNetExtractor.from_pretrained(PAIR.start)
    made = train_jointly(
        images.to(store.device), config=config, start=start, seed=seed, checkpoint=checkpoint
    )
    trigger = WatermarkTrigger(made.injector.cpu(), watermark=made.watermark.cpu()).eval()
    with torch.no_grad():
        marked = torch.cat([quantize(trigger(part)) for part in kept.split(256)])
    detector = MarkDetector.calibrate(made.extractor.cpu(), trigger.watermark, kept, marked=marked)
    tests = measure_on(PAIR.tests[0], trigger, detector, seed)
    return Result({**tests, "averaging": averaging_values(trigger, detector)})


def _main(argv: Sequence[str] | None) -> int:
    known = variants()
    parser = Parser(prog="ablate_varied", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*known], help="names of variants")
    parser.add_argument("--out", type=Path, required=True)
    add_common(parser, version="with the workspace")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(known):
        parser.error(f"expected variants among {', '.join(known)}, got {', '.join(unknown)}")
    images, kept = training_images(PAIR, seed=args.seed)
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    stages = [
        Stage(
            "varied",
            {"variant": name},
            partial(train_and_measure, known[name], images, kept, args.seed),
            {"recipe": plain(known[name]), "start": PAIR.start},
            data=digest,
        )
        for name in args.only
    ]
    device = str(resolve_device(args.device))
    return 0 if run(stages, args.out, device=device).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
