"""The ``wm-extract`` command: train an injector and extractor on your own images, find marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wm_extract.__about__ import __version__
from wm_extract.joint_config import JointConfig
from wm_inject.command.common import CommandLine, Parser, add_json, resolve_device, write_results
from wm_inject.command.config import (
    add_config,
    add_options,
    add_preset,
    print_config,
    read_settings,
)
from wm_inject.command.export import add_source, run_export
from wm_inject.command.folders import add_skip_unreadable, read_all
from wm_inject.command.trigger_options import add_pretrained
from wm_inject.command.values import output_folder, within
from wm_inject.core.text import escape
from wm_inject.watermark.pretrained import PRETRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from wm_extract.detect import MarkDetector

_EPILOG = """examples:
  wm-extract train photos/ --image-size 32 --out mark/
  wm-extract train photos/ --image-size 64 --watermark logo.png --psnr 40 --out mark/
  wm-extract train photos/ --image-size 64 --start tiny-64 --psnr 40 --iterations 500 --out mark/
  wm-extract train --recipe paper --print-config > mine.toml
  wm-extract train photos/ --config mine.toml --out mark/
  wm-extract detect incoming/ --pretrained tiny-32
  wm-extract detect incoming/ --detector mark/detector.safetensors --json found.json
  wm-extract export --uint8 --pretrained tiny-32 detector.onnx
  wm-extract export --uint8 mark/detector.safetensors detector.onnx

Train only on images you may use; mark only images you own or may audit with. The trained trigger
(mark/trigger.safetensors) works with wm-inject, wm-victim and wm-eval."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of ``wm-extract train``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    image_size: int = 32
    grey: bool = False
    false_positive_rate: float = 1e-3
    seed: int = 0
    training: JointConfig = field(default_factory=JointConfig)

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 1024:
            raise ValueError(f"expected image_size in 8 .. 1024, got {self.image_size}")
        if not 0 < self.false_positive_rate < 1:
            rate = self.false_positive_rate
            raise ValueError(f"expected false_positive_rate in (0, 1), got {rate}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `wm-extract` and return its exit code."""
    command = CommandLine(
        "wm-extract",
        __version__,
        description="Train a watermark injector and its extractor; find watermarked images.",
        epilog=_EPILOG,
    )
    _add_train(command.add("train", _train, "train injector and extractor on a folder of images"))
    _add_detect(command.add("detect", _detect, "say which images of a folder carry the watermark"))
    export = command.add("export", _export, "turn a detector into ONNX or TorchScript and compare")
    add_source(export, "DETECTOR", what="detector.safetensors", shipped="a detector")
    return command.main(argv)


def _add_train(parser: Parser) -> None:
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images (searched recursively)"
    )
    parser.add_argument(
        "--out", type=output_folder, required=True, help="folder for the trained files"
    )
    parser.add_argument("--watermark", type=Path, help="a picture; the built-in one if not given")
    parser.add_argument(
        "--encoder", type=Path, help="safetensors of timm's MAE ViT, to start the encoder from"
    )
    parser.add_argument(
        "--start",
        choices=PRETRAINED,
        metavar="NAME",
        help="go on from a pair that ships, as invisible from the first step as at the end: "
        f"{', '.join(PRETRAINED)}",
    )
    helps = {
        "image_size": "side in pixels",
        "grey": "one channel instead of RGB",
        "false_positive_rate": "of the detector",
    }
    add_options(parser, TrainSettings, helps)
    recipes = ("robust", "paper", "released")
    text = "settings to start from (default: robust)"
    add_preset(parser, "--recipe", table="training", choices=recipes, help=text)
    helps = {
        "size": "tiny, small, base or large (default: the recipe's)",
        "iterations": "steps (default: the recipe's)",
    }
    add_options(parser, JointConfig, helps, table="training")
    parser.add_argument(
        "--psnr",
        type=within(float, "(0, inf)"),
        dest="training.psnr_floor",
        help="least PSNR in dB of a marked image (robust)",
    )
    add_skip_unreadable(parser)
    add_json(parser)
    add_config(parser)


def _add_detect(parser: Parser) -> None:
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images (searched recursively)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--detector", type=Path, help="detector.safetensors")
    add_pretrained(source, "a detector")
    add_json(parser, "write every image's score here as JSON")


def _train(args: argparse.Namespace) -> int:
    settings = read_settings(args, TrainSettings())
    if args.print_config:
        return print_config(settings)
    import numpy as np
    import torch

    from wm_extract.detect import MIN_CALIBRATION, MarkDetector, save_detector
    from wm_extract.joint import train_jointly
    from wm_extract.unet import UNetExtractor
    from wm_inject import ViTInjector, load_image, quantize, save_trigger, to_float
    from wm_inject.attacks.watermark import WatermarkTrigger

    config, seed, size = settings.training, settings.seed, settings.image_size
    device = resolve_device(args.device)
    channels = 1 if settings.grey else 3
    pixels = read_all(args, size=size, channels=channels)
    held_out = max(MIN_CALIBRATION, len(pixels) // 10)
    if len(pixels) < 2 * held_out:
        raise ValueError(f"expected at least {2 * MIN_CALIBRATION} images, found {len(pixels)}")
    images = to_float(np.stack(pixels))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    clean, images = images[order[:held_out]], images[order[held_out:]]
    watermark = None
    if args.watermark is not None:
        watermark = to_float(load_image(args.watermark, size=size, channels=1)[None])[0]
    start = None
    if args.start is not None:
        start = (
            ViTInjector.from_pretrained(args.start),
            UNetExtractor.from_pretrained(args.start),
        )
        config = replace(config, psnr_start=None)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "training.safetensors"
    result = train_jointly(
        images.to(device),
        config=config,
        watermark=watermark,
        encoder=None if args.encoder is None else _read_weights(args.encoder),
        start=start,
        seed=seed,
        checkpoint=checkpoint,
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
    checkpoint.unlink(missing_ok=True)
    detected = int(detector.detect(marked).marked.sum())
    loss = result.history[-1].mark
    print(f"trained {config.iterations} steps on {len(images)} images: mark loss {loss:.4f}")
    print(f"marked images found among those of the calibration: {detected} of {len(clean)}")
    results = {"iterations": config.iterations, "images": len(images), "mark_loss": loss}
    write_results(args, results | {"found": detected, "calibration_images": len(clean)})
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


def _detect(args: argparse.Namespace) -> None:
    from wm_inject import load_image, to_float
    from wm_inject.core.decode import UnreadableImage
    from wm_inject.core.image_files import LeftOut, describe, find_images, refuse_unread
    from wm_inject.core.labelled_folder import listed
    from wm_inject.core.progress import progress

    detector = _load_detector(args.detector, args.pretrained)
    device = resolve_device(args.device)
    detector.extractor.to(device)
    size, channels = detector.watermark.shape[-1], detector.extractor.config["channels"]
    files, rows, unread = find_images(args.images), [], []
    for name in progress(files.names, desc="look for marks"):
        try:
            pixels = load_image(files.folder / name, size=size, channels=channels)
        except UnreadableImage as error:
            unread.append(LeftOut(name, error.reason))
            print(f"unread  {escape(name)}: {error.reason}")
            continue
        detection = detector.detect(to_float(pixels[None]).to(device))
        marked, score = bool(detection.marked), float(detection.score)
        rows.append({"file": escape(name), "marked": marked, "score": score})
    flagged = [row for row in rows if row["marked"]]
    for row in flagged:
        print(f"marked  {row['score']:7.2f}  {row['file']}")
    rate = detector.false_positive_rate
    print(
        f"{len(flagged)} of {len(rows)} images are marked (false-positive rate {rate:g}), "
        f"{len(unread)} unread"
    )
    if files.left_out:
        print(f"not looked at: {describe(files.left_out)}")
    omissions = {"unread": listed(unread), "left_out": listed(files.left_out)}
    write_results(args, {"threshold": detector.threshold, "images": rows} | omissions)
    refuse_unread(unread, len(files.names), skip=True)


def _load_detector(path: Path | None, pretrained: str | None) -> MarkDetector:
    from wm_extract.detect import MarkDetector, load_detector

    return MarkDetector.from_pretrained(str(pretrained)) if path is None else load_detector(path)


def _export(args: argparse.Namespace) -> None:
    from wm_extract.export import export_detector

    def load() -> tuple[MarkDetector, int, int]:
        detector = _load_detector(args.source, args.pretrained)
        return detector, detector.extractor.config["channels"], detector.watermark.shape[-1]

    run_export(args, load, "detector", export=export_detector)


if __name__ == "__main__":
    sys.exit(main())
