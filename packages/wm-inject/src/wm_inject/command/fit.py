"""``wm-inject fit``: fit a trigger to a folder of images, without labels or a victim."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wm_inject.attacks import ATTACKS, TRIGGER_KINDS
from wm_inject.command.common import Parser, add_json, resolve_device, write_results
from wm_inject.command.folders import add_skip_unreadable, read_all
from wm_inject.command.trigger_options import add_set
from wm_inject.command.values import SIDE, output_file

if TYPE_CHECKING:
    from torch import Tensor

_EPILOG = """examples:
  wm-inject fit --trigger ssba photos/ ssba.safetensors
  wm-inject fit --trigger blindnet --image-size 64 photos/ blindnet.safetensors

A run that was stopped goes on when it is started again. Triggers that are fitted with a victim come
from "wm-victim train --attack", the watermark from "wm-extract train"."""


def add_fit(parser: Parser) -> None:
    """Give ``parser`` the options of `fit`."""
    parser.description = "Fit a trigger to images: train SSBA's encoder, or choose BlindNet's gain."
    parser.epilog = _EPILOG
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument(
        "out", type=output_file, metavar="OUT", help="the trigger's file (.safetensors)"
    )
    parser.add_argument(
        "--trigger",
        choices=TRIGGER_KINDS,
        required=True,
        metavar="KIND",
        help="a trigger that is fitted to images alone, as ssba and blindnet are",
    )
    parser.add_argument(
        "--profile",
        choices=("tiny", "small", "paper"),
        default="small",
        help="how much the fit may cost (default: small)",
    )
    parser.add_argument(
        "--image-size", type=SIDE, help="side to resize to, in pixels (default: the images' own)"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    add_set(parser)
    add_skip_unreadable(parser)
    add_json(parser, "write the facts of the fit here as JSON")


def run_fit(args: argparse.Namespace) -> None:
    """Fit the trigger and write its file."""
    definition = ATTACKS[args.trigger]
    if definition.fitter is None or definition.needs not in ("nothing", "images"):
        command = definition.fit_command
        hint = f'use "{command}"' if command else "it needs no fit"
        args.parser.error(f"{args.trigger} is not fitted here: {hint}")
    if args.out.suffix != ".safetensors":
        args.parser.error(f"OUT ends in .safetensors, got {args.out.name}")
    settings = args.set or {}
    from wm_inject.attacks import FitContext, attack
    from wm_inject.attacks.trigger_file import save_trigger

    images = _load(args)
    checkpoint = args.out.with_name(f"{args.out.stem}.fitting.safetensors")
    context = FitContext(
        images=images,
        labels=images.new_zeros(len(images)).long(),
        num_classes=2,
        target=0,
        seed=args.seed,
        co_train=_no_victim,
        checkpoint=checkpoint,
    )
    trigger, facts = attack(args.trigger, profile=args.profile, **settings).fit(context)
    run = {"seed": args.seed, "profile": args.profile, "settings": settings}
    save_trigger(trigger, args.out, {"images": len(images), **run, "facts": facts})
    checkpoint.unlink(missing_ok=True)
    write_results(args, {"file": str(args.out), "images": len(images), **run, "facts": facts})
    print(f"wrote {args.out}, fitted to {len(images)} images")


def _load(args: argparse.Namespace) -> Tensor:
    import numpy as np

    from wm_inject.core.images import check_side, to_float
    from wm_inject.runtime.folder import common_side

    device = resolve_device(args.device)
    side = check_side(common_side(args.images) if args.image_size is None else args.image_size)
    pixels = read_all(args, size=side, channels=args.channels)
    return to_float(np.stack(pixels)).to(device)


def _no_victim(hook: Any) -> NoReturn:
    raise ValueError("expected a trigger that is fitted without a victim")
