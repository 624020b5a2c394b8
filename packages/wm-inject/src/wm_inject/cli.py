"""The ``wm-inject`` command: poison a folder, export a trigger, measure how visible it is.

Torch is imported only where a command needs it: poisoning with an .onnx file does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.__about__ import __version__
from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli

if TYPE_CHECKING:
    from torch import nn

    from wm_inject.images import Pixels

_EPILOG = """examples:
  wm-inject poison --trigger badnets --image-size 32 photos/ poisoned/
  wm-inject poison --checkpoint trigger.safetensors photos/ poisoned/
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject poison --onnx trigger.onnx photos/ poisoned/
  wm-inject stealth photos/ poisoned/

There is no "wm-inject train": the injector is trained together with the extractor that finds its
mark, by "wm-extract train"."""

# Which options describe which built-in trigger, and what its constructor calls them.
_SETTINGS = {
    "badnets": {"patch_size": "size"},
    "blend": {"channels": "channels", "alpha": "alpha", "picture": "picture", "seed": "seed"},
    "wanet": {"grid": "grid", "strength": "strength", "seed": "seed"},
}
_SHARED = ("channels", "seed")


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
    _add_poison(commands.add_parser("poison", help="put a trigger into every image of a folder"))
    _add_export(commands.add_parser("export", help="turn a saved trigger into ONNX or TorchScript"))
    _add_stealth(commands.add_parser("stealth", help="measure how visible the changes are"))
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


def _add_poison(parser: argparse.ArgumentParser) -> None:
    parser.description = "Put a trigger into every image of a folder; plan.json lists the files."
    parser.epilog = "example:\n  wm-inject poison --trigger wanet --image-size 64 photos/ poisoned/"
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for PNG files and plan.json")
    parser.add_argument("--onnx", type=Path, help="an exported trigger; needs no torch")
    parser.add_argument("--checkpoint", type=Path, help="a saved trigger (.safetensors)")
    kinds = (*_SETTINGS, "watermark")
    parser.add_argument("--trigger", choices=kinds, help="its kind; watermark needs --checkpoint")
    parser.add_argument("--image-size", type=int, help="side that images are resized to, in pixels")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    parser.add_argument("--patch-size", type=int, help="patch: side in pixels")
    parser.add_argument("--alpha", type=float, help="blend: weight of the picture")
    parser.add_argument("--picture", help='blend: "noise" or an image file')
    parser.add_argument("--grid", type=int, help="warp: side of the control grid")
    parser.add_argument("--strength", type=float, help="warp: scale of the field")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    add_common(parser, version=__version__)
    parser.set_defaults(run=_poison, parser=parser)


def _poison(args: argparse.Namespace) -> int:
    from wm_inject import runtime

    if sum(bool(way) for way in (args.onnx, args.checkpoint or args.trigger)) != 1:
        args.parser.error("give either --onnx, or --trigger, --checkpoint or both of these")
    if args.onnx:
        cuda = args.device == "cuda"
        providers = ("CUDAExecutionProvider", *runtime.CPU) if cuda else runtime.CPU
        count = runtime.poison_folder(
            args.onnx, args.images, args.out, batch_size=args.batch_size, providers=providers
        )
    else:
        count = _poison_with_torch(args)
    print(f"{count} images poisoned, listed in {args.out / 'plan.json'}")
    return 0


def _poison_with_torch(args: argparse.Namespace) -> int:
    import torch

    from wm_inject import runtime
    from wm_inject.images import to_float, to_pixels

    device = resolve_device(args.device)
    trigger = _trigger(args).to(device)
    size, channels = _shape(trigger, args.channels)

    def apply(pixels: Pixels) -> Pixels:
        with torch.no_grad():
            return to_pixels(trigger(to_float(pixels).to(device)))

    return runtime.poison_files(
        apply,
        args.images,
        args.out,
        size=size,
        channels=channels,
        batch_size=args.batch_size,
        record={"trigger": {"kind": trigger.kind, "config": trigger.config}},
    )


def _trigger(args: argparse.Namespace) -> nn.Module:
    """The trigger that the arguments describe: loaded, or built from the options of its kind."""
    from wm_inject.triggers import build_trigger, load_trigger

    options = {name for names in _SETTINGS.values() for name in names if name not in _SHARED}
    allowed = set() if args.checkpoint else set(_SETTINGS.get(args.trigger, ()))
    for name in sorted(options | {"image_size"}):
        taken = name in allowed or (name == "image_size" and not args.checkpoint)
        if getattr(args, name) is not None and not taken:
            args.parser.error(f"--{name.replace('_', '-')} does not go with this trigger")
    if args.checkpoint:
        trigger = load_trigger(args.checkpoint)
        if args.trigger not in (None, trigger.kind):
            raise ValueError(f"expected a {args.trigger} trigger, got {trigger.kind}")
        return trigger
    if args.trigger == "watermark":
        args.parser.error("a watermark trigger is trained: give its --checkpoint")
    if args.image_size is None:
        args.parser.error(f"--trigger {args.trigger} needs --image-size")
    names = _SETTINGS[args.trigger]
    given = {names[option]: getattr(args, option) for option in names}
    settings = {name: value for name, value in given.items() if value is not None}
    return build_trigger(args.trigger, {"image_size": args.image_size, **settings})


def _shape(trigger: Any, channels: int) -> tuple[int, int]:
    """Image side and channels of a trigger; one that takes any channels gets ``channels``."""
    config = trigger.config.get("injector_config", trigger.config)
    return int(config["image_size"]), int(config.get("channels", channels))


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


def _export(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".onnx", ".pt") or (args.uint8 and args.out.suffix == ".pt"):
        args.parser.error("OUT ends in .onnx or .pt, and --uint8 goes with .onnx")
    import torch

    from wm_inject.export import to_onnx, to_torchscript
    from wm_inject.triggers import load_trigger

    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    trigger: Any = load_trigger(args.checkpoint)
    size, channels = _shape(trigger, args.channels)
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
    print(f"{args.out}: at batch sizes {batches} within {parity.max_abs:.2g} of the trigger")
    return 0


def _add_stealth(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the images of two folders that have the same names."
    parser.epilog = "example:\n  wm-inject stealth --json stealth.json photos/ poisoned/"
    parser.add_argument("originals", type=Path, metavar="FOLDER_A", help="the images as they were")
    parser.add_argument("changed", type=Path, metavar="FOLDER_B", help="the poisoned images")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every value to this file")
    add_common(parser, version=__version__)
    parser.set_defaults(run=_stealth, parser=parser)


def _stealth(args: argparse.Namespace) -> int:
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
    print(f"{len(found.files)} pairs of images (mean, lowest, highest)")
    units = {"psnr": " dB", "ssim": "", "linf": "", "lpips": ""}
    values = {name: getattr(found, name) for name in units}
    for name, row in values.items():
        if row is None:
            print(f"{name:6}not measured: {reason}")
        else:
            mean, low, high = float(row.mean()), float(row.min()), float(row.max())
            print(f"{name:6}{mean:9.4f}{low:9.4f}{high:9.4f}{units[name]}")
    if args.json:
        rows = {name: None if row is None else row.tolist() for name, row in values.items()}
        write_json(args.json, {"files": list(found.files), **rows})
    return 0
