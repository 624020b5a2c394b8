"""What the ``export`` commands of all packages share, and that of ``wm-inject`` itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.__about__ import __version__
from wm_inject.command.common import Parser, add_common, add_json, resolve_device, write_found
from wm_inject.command.trigger import add_pretrained, image_shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wm_inject.export.parity import Parity

PRECISIONS = ("float32", "float16", "bfloat16", "int8")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser what every export takes: the file, its precision and its form.

    Args:
        parser: The parser of one command; it must take what to export itself.
    """
    parser.add_argument("out", type=Path, metavar="OUT", help="OUT.onnx or OUT.pt (TorchScript)")
    parser.add_argument("--uint8", action="store_true", help="stored pixels in and out (ONNX)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="inside the file (default: float32; float16 and int8 for ONNX, bfloat16 for .pt)",
    )
    parser.add_argument(
        "--external-data", action="store_true", help="weights in a file of their own (ONNX)"
    )
    parser.add_argument(
        "--any-size", action="store_true", help="images of any multiples of 8 pixels (ONNX)"
    )
    parser.add_argument("--batch", type=int, default=3, help="images to compare on (default: 3)")
    parser.add_argument(
        "--tolerance", type=float, help="largest difference (default: by precision)"
    )
    add_json(parser)


def add_source(parser: argparse.ArgumentParser, metavar: str, *, what: str, shipped: str) -> None:
    """Give a parser the file that is exported, or the name of weights that ship in its place.

    Args:
        parser: The parser of one command; OUT has to come next, by `add_export_options`.
        metavar: What the file is called in its help.
        what: What is in it.
        shipped: What ships.
    """
    told = f"{what}; leave it out with --pretrained"
    parser.add_argument("source", type=Path, metavar=metavar, help=told)
    add_export_options(parser)
    add_pretrained(parser, shipped)
    # The first path is OUT where the weights have a name: `settle_source` sorts that out.
    for action in parser._actions:
        if action.dest in ("source", "out"):
            action.required = False
    parser.set_defaults(source_name=metavar)


def settle_source(args: argparse.Namespace) -> None:
    """Leave with a usage error unless there is either a file or a name, and OUT."""
    paths = [path for path in (args.source, args.out) if path is not None]
    if args.pretrained is None and len(paths) == 2:
        return
    if args.pretrained is None or len(paths) != 1:
        args.parser.error(f"give either {args.source_name} or --pretrained NAME, and OUT")
    args.source, args.out = None, paths[0]


def export_module(
    args: argparse.Namespace,
    module: nn.Module,
    *,
    channels: int,
    size: int,
    relative: bool = False,
    **settings: Any,
) -> Parity:
    """Export a module by a command's options, and compare the file with it.

    Args:
        args: With the options of `add_export_options`, and a seed.
        module: Images in, one tensor out.
        channels: 1 or 3.
        size: Side of the images it is compared on.
        relative: Measure the difference as a share of the largest output.
        settings: More of what `to_onnx` or `to_torchscript` takes.

    Raises:
        ValueError: As for the exporters.
    """
    from wm_inject.export import to_onnx, to_torchscript

    example = example_images(args, channels=channels, size=size)
    wanted = {**form(args), "relative": relative, **settings}
    if args.out.suffix == ".pt":
        return to_torchscript(module, example, args.out, **wanted)
    return to_onnx(module, example, args.out, **wanted)


def form(args: argparse.Namespace) -> dict[str, Any]:
    """The exporter's settings that the options ask for."""
    onnx_only = {
        "uint8": args.uint8,
        "external_data": args.external_data or None,
        "any_size": args.any_size,
    }
    if args.out.suffix not in (".onnx", ".pt"):
        args.parser.error("OUT ends in .onnx or .pt")
    if args.out.suffix == ".pt" and any(onnx_only.values()):
        args.parser.error("--uint8, --external-data and --any-size go with .onnx")
    both = {"precision": args.precision, "tolerance": args.tolerance}
    return both if args.out.suffix == ".pt" else both | onnx_only


def example_images(args: argparse.Namespace, *, channels: int, size: int) -> Tensor:
    """Random images to compare on, seeded: float32 ``(batch, channels, size, size)`` in [0, 1]."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    # On the 8-bit grid, as stored images are: a graph of stored pixels sees the same values.
    drawn = torch.randint(0, 256, (args.batch, channels, size, size), generator=generator)
    return drawn.float() / 255


def told(args: argparse.Namespace, parity: Parity, what: str) -> str:
    """What an export says when it is done; the same goes to the file of --json."""
    batches = " and ".join(str(size) for size in parity.batches)
    found = {"max_abs": parity.max_abs, "batches": list(parity.batches)}
    write_found(args, {"file": str(args.out), "precision": args.precision, **found})
    return f"{args.out}: at batch sizes {batches} within {parity.max_abs:.2g} of the {what}"


def add_export(parser: Parser) -> None:
    """Give ``parser`` the options of ``wm-inject export``."""
    parser.description = "Export a trigger, reload the file and compare it with the trigger."
    parser.epilog = """examples:
  wm-inject export --uint8 --pretrained tiny-32 trigger.onnx
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject export --uint8 --precision int8 trigger.safetensors small.onnx
  wm-inject export --uint8 --triton repository/ trigger.safetensors trigger.onnx"""
    add_source(parser, "CHECKPOINT", what="a saved trigger", shipped="a trained watermark")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    parser.add_argument(
        "--triton", type=Path, metavar="DIR", help="also put it into a Triton model repository"
    )
    add_common(parser, version=__version__)
    parser.set_defaults(run=run_export, parser=parser)


def run_export(args: argparse.Namespace) -> str:
    """Export the trigger, and say in a line how far the file is from it."""
    from wm_inject.triggers import load_trigger
    from wm_inject.triggers.watermark import WatermarkTrigger

    settle_source(args)
    form(args)  # refuses a wrong suffix before any work is done
    if args.triton is not None and args.out.suffix != ".onnx":
        args.parser.error("--triton goes with .onnx")
    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    trigger: Any
    if args.pretrained is None:
        trigger = load_trigger(args.source)
    else:
        trigger = WatermarkTrigger.from_pretrained(args.pretrained)
    size, channels = image_shape(trigger, args.channels)
    parity = export_module(args, trigger, channels=channels, size=size)
    line = told(args, parity, "trigger")
    if args.triton is None:
        return line
    from wm_inject.serve.triton import write_triton

    return f"{line}\nTriton model in {write_triton(args.out, args.triton)}"
