"""What each part of the `robust` recipe is worth: injectors that differ in one thing only.

For example ``python tools/ablate_injector.py --limit 20000 --out results/ablation-injector``.

Variants: the paper's recipe to the letter (10,000 steps of SGD, 24 + 8 blocks; about an hour on one
core), and the robust recipe whole, without anti-collapse, without a bound on single values, without
corrupting clean images in training, and at the paper's depth. Every variant is a record; a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from wm_eval.config import plain
from wm_eval.engine import Result, Stage, Store, run
from wm_eval.measure import mark_values, stealth_values
from wm_extract import EXTRA_CORRUPTIONS, PAPER_CORRUPTIONS, JointConfig, train_jointly
from wm_inject import WatermarkTrigger, quantize
from wm_inject.command.common import Parser, add_common, resolve_device, run_cli
from wm_victim import Dataset, load_dataset
from wm_victim.metrics import triggered_images


def variants(iterations: int, psnr_floor: float) -> dict[str, JointConfig]:
    """The recipes that are compared, by name."""
    robust = {"iterations": iterations, "psnr_floor": psnr_floor}
    return {
        "robust": JointConfig.preset("robust", **robust),
        "robust-no-anti-collapse": JointConfig.preset(
            "robust", corruption_probability=0.0, **robust
        ),
        "robust-free-amplitude": JointConfig.preset("robust", max_change=None, **robust),
        "robust-clean-uncorrupted": JointConfig.preset("robust", corrupt_clean=False, **robust),
        "robust-24-8-blocks": JointConfig.preset("robust", depth=24, decoder_depth=8, **robust),
        "paper": JointConfig.preset("paper"),
    }


def train_and_measure(
    data: Dataset,
    config: JointConfig,
    test_images: int,
    seed: int,
    store: Store,
    checkpoint: Path,
) -> Result:
    """One variant: train it, then measure stealth, bits and detection on test images."""
    result = train_jointly(
        data.train.images.to(store.device), config=config, seed=seed, checkpoint=checkpoint
    )
    trigger = WatermarkTrigger(result.injector, watermark=result.watermark)
    test = data.test.subset(torch.arange(min(test_images, len(data.test)))).to(store.device)
    images, poisoned = quantize(test.images), triggered_images(trigger, test)
    values = mark_values(
        result.extractor,
        result.watermark,
        images,
        poisoned,
        corruptions={**PAPER_CORRUPTIONS, **EXTRA_CORRUPTIONS},
        false_positive_rate=1e-3,
        seed=seed,
    )
    history = [row._asdict() for row in result.history]
    return Result({**values, "stealth": stealth_values(poisoned, images), "history": history})


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="ablate_injector", description=__doc__)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--limit", type=int, help="training images (default: all)")
    parser.add_argument("--iterations", type=int, default=2500, help="steps of the robust variants")
    parser.add_argument("--psnr", type=float, default=36.6, help="their PSNR floor in dB")
    parser.add_argument("--test-images", type=int, default=1200)
    parser.add_argument("--only", nargs="*", help="names of variants (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    add_common(parser, version="with the workspace")
    args: argparse.Namespace = parser.parse_args(argv)
    known = variants(args.iterations, args.psnr)
    names = args.only or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"expected variants among {', '.join(known)}, got {', '.join(unknown)}")
    data = load_dataset(args.data, limit=args.limit)
    device = str(resolve_device(args.device))
    stages = [
        Stage(
            "injector",
            {"variant": name},
            partial(train_and_measure, data, known[name], args.test_images, args.seed),
            {"recipe": plain(known[name]), "test_images": args.test_images},
            data=data.fingerprint,
        )
        for name in names
    ]
    return 0 if run(stages, args.out, device=device).complete else 1


if __name__ == "__main__":
    sys.exit(run_cli(_main))
