"""``wm-inject poison``: put a trigger into a folder of images, all of them or by a plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import Parser, add_json, resolve_device, write_results
from wm_inject.command.folders import add_labels, add_skip_unreadable, say
from wm_inject.command.stealth import resized_line
from wm_inject.command.trigger_options import (
    add_trigger,
    check_trigger,
    image_shape,
    make_trigger,
    trigger_digest,
)
from wm_inject.command.values import BATCH, output_folder, within

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels
    from wm_inject.core.labelled_folder import LabelledFolder
    from wm_inject.core.plan import Labels, PoisonPlan, Pool
    from wm_inject.runtime.folder import FolderResult

_EPILOG = """examples:
  wm-inject poison --pretrained tiny-64 photos/ poisoned/
  wm-inject poison --trigger wanet --seed 1 photos/ poisoned/
  wm-inject poison --trigger sig --set frequency=6 --label-map clean-label classes/ poisoned/
  wm-inject poison --checkpoint trigger.safetensors photos/ poisoned/

A learned watermark leaves every picture its size, colours and format. Other triggers have a place
or a size of their own: images are resized to theirs and written as PNG.

plan.json lists every file: whether it carries the trigger, its label before and after. A run that
was stopped goes on when it is started again."""


def add_poison(parser: Parser) -> None:
    """Give ``parser`` the options of `poison`."""
    parser.description = "Put a trigger into the images of a folder; plan.json lists the files."
    parser.epilog = _EPILOG
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument(
        "out", type=output_folder, metavar="OUT", help="folder for the files and plan.json"
    )
    add_trigger(parser)
    plan = parser.add_argument_group("the plan (labels: class folders or labels.csv in IMAGES)")
    add_labels(plan)
    plan.add_argument(
        "--ratio", type=within(float, "(0, 1]"), help="share poisoned (default: the whole pool)"
    )
    plan.add_argument(
        "--target", type=within(int, "[0, inf)"), default=0, help="label asked for (default: 0)"
    )
    maps = ("all-to-one", "all-to-all", "source-specific", "clean-label")
    plan.add_argument("--label-map", choices=maps, default="all-to-one", help=f"default: {maps[0]}")
    plan.add_argument(
        "--source", type=within(int, "[0, inf)"), help="class that it works on (source-specific)"
    )
    plan.add_argument(
        "--pool",
        choices=("all", "non_target", "target"),
        help="where files are drawn from (default: all; with clean-label: target)",
    )
    parser.add_argument(
        "--resize", action="store_true", help="a watermark, too: PNG of the trigger's size"
    )
    parser.add_argument(
        "--jpeg-quality",
        type=within(int, "[1, 100]"),
        default=95,
        help="of files that are JPEG and stay so (default: 95)",
    )
    parser.add_argument("--batch-size", type=BATCH, default=64, help="images at once (default: 64)")
    add_skip_unreadable(parser)
    add_json(parser)


def run_poison(args: argparse.Namespace) -> None:
    """Poison the folder and print the counts."""
    from wm_inject.core.image_files import describe
    from wm_inject.core.labelled_folder import listed, read_labelled_folder

    check_trigger(args)
    poison = _with_onnx(args) if args.onnx else _with_torch(args)
    data = read_labelled_folder(args.images, labels=args.labels)
    say(data.lines())
    result = poison(data)
    counts = {"images": result.images, "poisoned": result.poisoned, "written": result.written}
    counts |= {"resized": result.resized.total(), "grey": result.grey}
    write_results(args, counts | {"source": data.to_dict(), "unread": listed(result.unread)})
    existing = result.images - result.written
    note = f", {existing} files were there" if existing else ""
    listing = args.out / "plan.json"
    if result.resized:
        print(resized_line(result.resized, result.written))
    if result.grey:
        print(f"{result.grey} are grey and keep no mark in colour: --resize writes all in colour")
    print(f"{result.poisoned} of {result.images} images poisoned, listed in {listing}{note}")
    if result.unread:
        print(f"left out, as they cannot be read: {describe(result.unread)}")


def _plan(args: argparse.Namespace) -> PoisonPlan:
    from wm_inject.core.plan import PoisonPlan

    default: Pool = "target" if args.label_map == "clean-label" else "all"
    return PoisonPlan(
        ratio=args.ratio,
        target=args.target,
        label_map=args.label_map,
        pool=args.pool or default,
        seed=args.seed,
        source=args.source,
    )


def _with_onnx(args: argparse.Namespace) -> Callable[[LabelledFolder], FolderResult]:
    from wm_inject import runtime

    return lambda data: runtime.poison_folder(
        args.onnx,
        data,
        args.out,
        plan=_plan(args),
        batch_size=args.batch_size,
        skip_unreadable=args.skip_unreadable,
        whole=False if args.resize else None,
        jpeg_quality=args.jpeg_quality,
        providers=runtime.providers_for(args.device),
    )


def _with_torch(args: argparse.Namespace) -> Callable[[LabelledFolder], FolderResult]:
    import torch

    from wm_inject.core.images import to_float, to_pixels
    from wm_inject.core.whole_pictures import ANY_SIZE
    from wm_inject.runtime.folder import poison_files

    device = resolve_device(args.device)
    trigger: Any = make_trigger(args)
    record = {
        "trigger": {"kind": trigger.kind, "config": trigger.config},
        "sha256": trigger_digest(trigger),
    }
    trigger.to(device)
    size, channels = image_shape(trigger, args.channels)

    def apply(pixels: Pixels, *, ids: Labels, target: Labels) -> Pixels:
        with torch.no_grad():
            extra = {"ids": ids, "target": target}
            tensors = {name: torch.from_numpy(value).to(device) for name, value in extra.items()}
            return to_pixels(trigger(to_float(pixels).to(device), **tensors))

    return lambda data: poison_files(
        apply,
        data,
        args.out,
        size=size,
        channels=channels,
        plan=_plan(args),
        batch_size=args.batch_size,
        skip_unreadable=args.skip_unreadable,
        whole=trigger.kind in ANY_SIZE and not args.resize,
        jpeg_quality=args.jpeg_quality,
        record=record,
    )
