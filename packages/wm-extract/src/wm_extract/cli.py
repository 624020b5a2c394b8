"""The `wm-extract` command: train an injector and extractor on your own images; look for marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wm_extract.__about__ import __version__
from wm_inject.cli_common import Parser, add_common, add_completion, resolve_device, run_cli
from wm_inject.cli_export import add_export_options, example_images, form, told
from wm_inject.pretrained import PRETRAINED

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """examples:
  wm-extract train photos/ --image-size 32 --out mark/
  wm-extract train photos/ --image-size 64 --watermark logo.png --psnr 40 --out mark/
  wm-extract detect incoming/ --pretrained tiny-32
  wm-extract detect incoming/ --detector mark/detector.safetensors --json found.json
  wm-extract export --uint8 mark/detector.safetensors detector.onnx

Train only on images you may use; mark only images you own or may audit with. The trained trigger
(mark/trigger.safetensors) works with wm-inject, wm-victim and wm-eval."""


def _parser() -> Parser:
    parser = Parser(prog="wm-extract", description=__doc__, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"wm-extract {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train injector and extractor on a folder of images")
    train.add_argument("images", type=Path, help="folder of images (searched recursively)")
    train.add_argument("--out", type=Path, required=True, help="folder for the trained files")
    train.add_argument("--image-size", type=int, default=32, help="side in pixels (default: 32)")
    train.add_argument("--grey", action="store_true", help="one channel instead of RGB")
    train.add_argument("--watermark", type=Path, help="a picture; the built-in one if not given")
    train.add_argument("--recipe", default="robust", help="robust, paper or released")
    train.add_argument("--size", default="tiny", help="tiny, small, base or large")
    train.add_argument(
        "--encoder", type=Path, help="safetensors of timm's MAE ViT, to start the encoder from"
    )
    train.add_argument("--iterations", type=int, help="steps (default: the recipe's)")
    train.add_argument("--psnr", type=float, help="least PSNR in dB of a marked image (robust)")
    train.add_argument("--false-positive-rate", type=float, default=1e-3)
    add_common(train, version=__version__)

    detect = commands.add_parser("detect", help="which images of a folder carry the watermark")
    detect.add_argument("images", type=Path, help="folder of images (searched recursively)")
    which = detect.add_mutually_exclusive_group(required=True)
    which.add_argument("--detector", type=Path, help="detector.safetensors")
    which.add_argument(
        "--pretrained",
        choices=PRETRAINED,
        metavar="NAME",
        help=f"a detector that ships: {', '.join(PRETRAINED)}",
    )
    detect.add_argument("--json", type=Path, help="write every image's score here")
    add_common(detect, version=__version__)

    export = commands.add_parser("export", help="turn a detector into ONNX or TorchScript")
    export.add_argument("detector", type=Path, metavar="DETECTOR", help="detector.safetensors")
    add_export_options(export)
    add_common(export, version=__version__)
    export.set_defaults(parser=export)
    return parser


def _train(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from wm_extract.detect import MIN_CALIBRATION, MarkDetector, save_detector
    from wm_extract.joint import train_jointly
    from wm_extract.recipe import JointConfig
    from wm_inject import list_images, load_image, quantize, save_trigger, to_float
    from wm_inject.triggers.watermark import WatermarkTrigger

    changes = {"size": args.size, "iterations": args.iterations, "psnr_floor": args.psnr}
    config = JointConfig.preset(
        args.recipe, **{name: value for name, value in changes.items() if value is not None}
    )
    device = resolve_device(args.device)
    channels = 1 if args.grey else 3
    files = list_images(args.images)
    held_out = max(MIN_CALIBRATION, len(files) // 10)
    if len(files) < 2 * held_out:
        raise ValueError(f"expected at least {2 * MIN_CALIBRATION} images, found {len(files)}")
    pixels = np.stack([load_image(f, size=args.image_size, channels=channels) for f in files])
    images = to_float(pixels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    clean, images = images[order[:held_out]], images[order[held_out:]]
    mark = None
    if args.watermark is not None:
        mark = to_float(load_image(args.watermark, size=args.image_size, channels=1)[None])[0]
    encoder = None
    if args.encoder is not None:
        encoder = _read_weights(args.encoder)
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "training.safetensors"
    result = train_jointly(
        images.to(device),
        config=config,
        watermark=mark,
        encoder=encoder,
        seed=args.seed,
        checkpoint=state,
    )
    trigger = WatermarkTrigger(result.injector.cpu(), watermark=result.watermark.cpu())
    with torch.no_grad():
        marked = quantize(torch.cat([trigger(part) for part in clean.split(64)]))
    detector = MarkDetector.calibrate(
        result.extractor.cpu(),
        result.watermark.cpu(),
        clean,
        marked=marked,
        false_positive_rate=args.false_positive_rate,
    )
    metadata = {"recipe": config.recipe, "seed": args.seed, "images": len(images)}
    save_trigger(trigger, args.out / "trigger.safetensors", metadata=metadata)
    save_detector(detector, args.out / "detector.safetensors")
    state.unlink(missing_ok=True)
    found = int(detector.detect(marked).marked.sum())
    last = result.history[-1]
    print(f"trained {config.iterations} steps on {len(images)} images: mark loss {last.mark:.4f}")
    print(f"marked images found among those of the calibration: {found} of {len(clean)}")
    print(f"wrote {args.out}/trigger.safetensors and {args.out}/detector.safetensors")
    return 0


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A plain safetensors state dict, as model hubs hold them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected safetensors weights at {path}: {error}") from error


def _detect(args: argparse.Namespace) -> int:
    from wm_extract.detect import MarkDetector, load_detector
    from wm_inject import list_images, load_image, to_float
    from wm_inject.cli_common import progress
    from wm_inject.files import write_json

    if args.pretrained:
        detector = MarkDetector.from_pretrained(args.pretrained)
    else:
        detector = load_detector(args.detector)
    device = resolve_device(args.device)
    detector.extractor.to(device)
    size, channels = detector.watermark.shape[-1], detector.extractor.config["channels"]
    rows = []
    for file in progress(list_images(args.images), desc="look for marks"):
        image = to_float(load_image(file, size=size, channels=channels)[None]).to(device)
        found = detector.detect(image)
        name = str(file.relative_to(args.images))
        rows.append({"file": name, "marked": bool(found.marked), "score": float(found.score)})
    marked = [row for row in rows if row["marked"]]
    for row in marked:
        print(f"marked  {row['score']:7.2f}  {row['file']}")
    rate = detector.false_positive_rate
    print(f"{len(marked)} of {len(rows)} images are marked (false-positive rate {rate:g})")
    if args.json is not None:
        write_json(args.json, {"threshold": detector.threshold, "images": rows})
    return 0


def _export(args: argparse.Namespace) -> int:
    from wm_extract.detect import load_detector
    from wm_extract.export import export_detector

    settings = form(args)  # refuses a wrong suffix before any work is done
    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    detector = load_detector(args.detector)
    channels, size = detector.extractor.config["channels"], detector.watermark.shape[-1]
    images = example_images(args, channels=channels, size=size)
    given = {name: value for name, value in settings.items() if value is not None}
    print(told(args, export_detector(detector, images, args.out, **given), "detector"))
    return 0


def _main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return {"train": _train, "detect": _detect, "export": _export}[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `wm-extract` and return its exit code."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
