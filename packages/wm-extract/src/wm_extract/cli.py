"""The `wm-extract` command: train an injector and extractor on your own images; look for marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wm_extract.__about__ import __version__
from wm_inject.command.common import (
    Parser,
    add_common,
    add_completion,
    add_json,
    resolve_device,
    run_cli,
    write_found,
)
from wm_inject.command.config import add_config, print_config
from wm_inject.command.export import add_source, example_images, form, settle_source, told
from wm_inject.command.trigger import add_pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from wm_extract.detect import MarkDetector

EPILOG = """examples:
  wm-extract train photos/ --image-size 32 --out mark/
  wm-extract train photos/ --image-size 64 --watermark logo.png --psnr 40 --out mark/
  wm-extract train --recipe paper --print-config > mine.toml
  wm-extract train photos/ --config mine.toml --out mark/
  wm-extract detect incoming/ --pretrained tiny-32
  wm-extract detect incoming/ --detector mark/detector.safetensors --json found.json
  wm-extract export --uint8 --pretrained tiny-32 detector.onnx
  wm-extract export --uint8 mark/detector.safetensors detector.onnx

Train only on images you may use; mark only images you own or may audit with. The trained trigger
(mark/trigger.safetensors) works with wm-inject, wm-victim and wm-eval."""


def _parser() -> Parser:
    parser = Parser(prog="wm-extract", description=__doc__, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"wm-extract {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train injector and extractor on your images"))
    _add_detect(commands.add_parser("detect", help="which images of a folder carry the watermark"))
    _add_export(commands.add_parser("export", help="turn a detector into ONNX or TorchScript"))
    for command in commands.choices.values():
        command.epilog = EPILOG
        command.set_defaults(parser=command)
    return parser


def _add_train(train: Parser) -> None:
    train.description = "Train injector and extractor on a folder of images."
    train.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images (searched recursively)"
    )
    train.add_argument("--out", type=Path, required=True, help="folder for the trained files")
    train.add_argument("--image-size", type=int, help="side in pixels (default: 32)")
    train.add_argument(
        "--grey", action=argparse.BooleanOptionalAction, help="one channel instead of RGB"
    )
    train.add_argument("--watermark", type=Path, help="a picture; the built-in one if not given")
    train.add_argument("--recipe", help="robust, paper or released (default: robust)")
    train.add_argument("--size", help="tiny, small, base or large (default: the recipe's)")
    train.add_argument(
        "--encoder", type=Path, help="safetensors of timm's MAE ViT, to start the encoder from"
    )
    train.add_argument("--iterations", type=int, help="steps (default: the recipe's)")
    train.add_argument("--psnr", type=float, help="least PSNR in dB of a marked image (robust)")
    train.add_argument("--false-positive-rate", type=float, help="of the detector (default: 0.001)")
    add_json(train)
    add_common(train, version=__version__)
    add_config(train)


def _add_detect(detect: Parser) -> None:
    detect.description = "Say which images of a folder carry the watermark."
    detect.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images (searched recursively)"
    )
    which = detect.add_mutually_exclusive_group(required=True)
    which.add_argument("--detector", type=Path, help="detector.safetensors")
    add_pretrained(which, "a detector")
    add_json(detect, "write every image's score here as JSON")
    add_common(detect, version=__version__)


def _add_export(export: Parser) -> None:
    export.description = "Export a detector, reload the file and compare it with the detector."
    add_source(export, "DETECTOR", what="detector.safetensors", shipped="a detector")
    add_common(export, version=__version__)


def _train(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from wm_extract.detect import MIN_CALIBRATION, MarkDetector, save_detector
    from wm_extract.joint import train_jointly
    from wm_extract.settings import train_settings
    from wm_inject import list_images, load_image, quantize, save_trigger, to_float
    from wm_inject.triggers.watermark import WatermarkTrigger

    settings = train_settings(args)
    if args.print_config:
        return print_config(settings)
    config, seed, size = settings.training, settings.seed, settings.image_size
    device = resolve_device(args.device)
    channels = 1 if settings.grey else 3
    files = list_images(args.images)
    held_out = max(MIN_CALIBRATION, len(files) // 10)
    if len(files) < 2 * held_out:
        raise ValueError(f"expected at least {2 * MIN_CALIBRATION} images, found {len(files)}")
    pixels = np.stack([load_image(f, size=size, channels=channels) for f in files])
    images = to_float(pixels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    clean, images = images[order[:held_out]], images[order[held_out:]]
    mark = None
    if args.watermark is not None:
        mark = to_float(load_image(args.watermark, size=size, channels=1)[None])[0]
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
        seed=seed,
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
        false_positive_rate=settings.false_positive_rate,
    )
    metadata = {"recipe": config.recipe, "seed": seed, "images": len(images)}
    save_trigger(trigger, args.out / "trigger.safetensors", metadata=metadata)
    save_detector(detector, args.out / "detector.safetensors")
    state.unlink(missing_ok=True)
    found = int(detector.detect(marked).marked.sum())
    last = result.history[-1]
    print(f"trained {config.iterations} steps on {len(images)} images: mark loss {last.mark:.4f}")
    print(f"marked images found among those of the calibration: {found} of {len(clean)}")
    measured = {"iterations": config.iterations, "images": len(images), "mark_loss": last.mark}
    measured |= {"found": found, "calibration_images": len(clean)}
    write_found(args, measured)
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
    from wm_inject import list_images, load_image, to_float
    from wm_inject.core.progress import progress

    detector = _open(args.detector, args.pretrained)
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
    write_found(args, {"threshold": detector.threshold, "images": rows})
    return 0


def _open(path: Path | None, name: str | None) -> MarkDetector:
    """A detector from its file, or one that ships."""
    from wm_extract.detect import MarkDetector, load_detector

    if path is not None:
        return load_detector(path)
    return MarkDetector.from_pretrained(str(name))


def _export(args: argparse.Namespace) -> int:
    from wm_extract.export import export_detector

    settle_source(args)
    settings = form(args)  # refuses a wrong suffix before any work is done
    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    detector = _open(args.source, args.pretrained)
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
