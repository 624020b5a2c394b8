"""What the ``export`` commands of all packages share, and that of ``wm-inject`` itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import Parser, add_json, resolve_device, write_results
from wm_inject.command.trigger_options import add_pretrained, image_shape
from wm_inject.command.values import output_file, output_folder, positive, within

if TYPE_CHECKING:
    from torch import Tensor

    from wm_inject.export import Parity

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
_EPILOG = """examples:
  wm-inject export --uint8 --pretrained tiny-32 trigger.onnx
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject export --uint8 --precision int8 trigger.safetensors small.onnx
  wm-inject export --uint8 --triton repository/ trigger.safetensors trigger.onnx"""


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the file to write, its precision and its form."""
    parser.add_argument(
        "out", type=output_file, metavar="OUT", help="OUT.onnx or OUT.pt (TorchScript)"
    )
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
    parser.add_argument(
        "--batch",
        type=within(int, "[3, 65536]"),
        default=3,
        help="images to compare on (default: 3)",
    )
    parser.add_argument(
        "--tolerance", type=positive, help="largest difference (default: by precision)"
    )
    add_json(parser)


def add_source(parser: argparse.ArgumentParser, metavar: str, *, what: str, shipped: str) -> None:
    """Give a parser the file to export or --pretrained, then the options of every export.

    Args:
        parser: The parser of one command.
        metavar: The file's name in the help.
        what: Its content.
        shipped: What --pretrained takes in its place.
    """
    text = f"{what}; leave it out with --pretrained"
    parser.add_argument("source", type=Path, metavar=metavar, help=text)
    add_export_options(parser)
    add_pretrained(parser, shipped)
    # With --pretrained there is one path, OUT, which argparse reads as the source.
    for action in parser._actions:
        if action.dest in ("source", "out"):
            action.required = False
    parser.set_defaults(source_name=metavar)


def run_export(
    args: argparse.Namespace,
    load: Callable[[], tuple[Any, int, int]],
    what: str,
    *,
    export: Callable[..., Parity] | None = None,
    **settings: Any,
) -> None:
    """Run an ``export`` command: load, write, compare, print the difference.

    Args:
        args: With the options of `add_export_options`, and of `add_source` where it has them.
        load: What to export, its channels and the side of its images.
        what: What to call it in the printed line.
        export: The exporter; that of `wm_inject.export` for the file's suffix if None.
        settings: More settings of the exporter.
    """
    _resolve_source(args)
    settings |= {name: value for name, value in _settings(args).items() if value is not None}
    resolve_device(args.device)  # the comparison runs on the CPU, but "cuda" without one is refused
    module, channels, size = load()
    if export is None:
        from wm_inject.export import to_onnx, to_torchscript

        export = to_torchscript if args.out.suffix == ".pt" else to_onnx
    images = _random_images((args.batch, channels, size, size), seed=args.seed)
    parity = export(module, images, args.out, **settings)
    results = {"max_abs": parity.max_abs, "batches": list(parity.batches)}
    write_results(args, {"file": str(args.out), "precision": args.precision, **results})
    batches = " and ".join(str(size) for size in parity.batches)
    print(f"{args.out}: at batch sizes {batches} within {parity.max_abs:.2g} of the {what}")


def _resolve_source(args: argparse.Namespace) -> None:
    """Refuse anything but either a file or --pretrained, and OUT."""
    if "source_name" not in args:
        return
    paths = [path for path in (args.source, args.out) if path is not None]
    if len(paths) != (1 if args.pretrained else 2):
        args.parser.error(f"give either {args.source_name} or --pretrained NAME, and OUT")
    try:
        args.out = output_file(str(paths.pop()))  # argparse may have read it as the source
    except argparse.ArgumentTypeError as error:
        args.parser.error(f"argument OUT: {error}")
    args.source = paths.pop() if paths else None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The exporter's settings that the options name; None where it has its own default."""
    onnx_only = {
        "uint8": args.uint8,
        "external_data": args.external_data or None,
        "any_size": args.any_size,
    }
    settings = {"precision": args.precision, "tolerance": args.tolerance}
    if args.out.suffix == ".onnx":
        return settings | onnx_only
    if args.out.suffix != ".pt":
        args.parser.error("OUT ends in .onnx or .pt")
    if any(onnx_only.values()):
        args.parser.error("--uint8, --external-data and --any-size go with .onnx")
    return settings


def _random_images(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Random images on the 8-bit grid, on which a graph of stored pixels sees the same values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float() / 255


def add_export(parser: Parser) -> None:
    """Give ``parser`` the options of ``wm-inject export``."""
    parser.description = "Export a trigger, reload the file and compare it with the trigger."
    parser.epilog = _EPILOG
    add_source(parser, "CHECKPOINT", what="a saved trigger", shipped="a trained watermark")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    parser.add_argument(
        "--triton",
        type=output_folder,
        metavar="DIR",
        help="also put it into a Triton model repository",
    )


def export_trigger(args: argparse.Namespace) -> None:
    """Run ``wm-inject export``."""

    def load() -> tuple[Any, int, int]:
        from wm_inject import WatermarkTrigger, load_trigger

        if args.triton is not None and args.out.suffix != ".onnx":
            args.parser.error("--triton goes with .onnx")
        trigger: Any
        if args.pretrained is None:
            trigger = load_trigger(args.source)
        else:
            trigger = WatermarkTrigger.from_pretrained(args.pretrained)
        size, channels = image_shape(trigger, args.channels)
        return trigger, channels, size

    run_export(args, load, "trigger")
    if args.triton is not None:
        from wm_inject.serve.triton import write_triton

        print(f"Triton model in {write_triton(args.out, args.triton)}")
