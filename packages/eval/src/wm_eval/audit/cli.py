"""The commands about untrusted models and images: ``scan``, ``clean`` and ``inspect``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import (
    EXIT_NOT_SCANNED,
    CommandLine,
    Parser,
    add_json,
    comma_list,
    positive,
    write_results,
)
from wm_inject.command.config import add_config, add_options, print_config, read_settings
from wm_inject.command.folders import add_labels, say

if TYPE_CHECKING:
    from torch import Tensor

    from wm_eval.audit.checks import Checked
    from wm_eval.audit.images import CleanImages
    from wm_eval.audit.outputs import About
    from wm_eval.audit.scan import Audit
    from wm_victim.loading import OpenedModel

_SCAN_EPILOG = """\
examples:
  wm-eval scan model.onnx --images clean/ --html audit.html
  wm-eval scan weights.safetensors --arch resnet18 --images clean/ --json audit.json --minutes 30
  wm-eval scan victim.safetensors --images clean/ --labels labels.csv --sarif audit.sarif

The exit code is the verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (a file or images
that cannot be used), 64 wrong usage. No code of the model's file runs in this process. Class
folders or a table of files and labels tell the true classes; without them the model's own answers
are used.
"""
_CLEAN_EPILOG = """\
examples:
  wm-eval clean model.onnx --images clean/ --out cleaned.onnx

It exits with the verdict on the cleaned model, as "scan" does, and 3 if nothing was cleaned. What
the second scan still names is unlearned as well, and so on. The cleaned file takes images in
[0, 1].
"""
_INSPECT_EPILOG = """\
examples:
  wm-eval inspect incoming/ --extractor detector.onnx --csv found.csv --html found.html

The exit code is 0 whatever is flagged, and 1 after an error or if no image could be read.
"""


@dataclass(frozen=True)
class ScanSettings:
    """Settings of ``wm-eval scan``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    count: int = 500
    detectors: tuple[str, ...] = ("nc", "reverse")
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class CleanSettings:
    """Settings of ``wm-eval clean``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    rounds: int = 3
    count: int = 500
    detectors: tuple[str, ...] = ("nc", "reverse")
    preset: str = "fast"
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.rounds < 1:
            raise ValueError(f"expected rounds >= 1, got {self.rounds}")


def _check(settings: ScanSettings | CleanSettings) -> None:
    from wm_eval.audit.scan import build_detectors

    build_detectors(settings.detectors, settings.preset, settings.alpha)
    if settings.count < 1:
        raise ValueError(f"expected count >= 1, got {settings.count}")


def add_audit(command: CommandLine) -> None:
    """Add ``scan``, ``clean`` and ``inspect``."""
    scan = command.add(
        "scan",
        _scan,
        "is an untrusted model backdoored? a verdict as the exit code",
        epilog=_SCAN_EPILOG,
        exit_error=EXIT_NOT_SCANNED,
    )
    _add_model(scan, ScanSettings)
    add_json(scan, "write the whole report here as JSON")
    scan.add_argument("--sarif", type=Path, help="write a SARIF 2.1.0 log here")
    scan.add_argument("--html", type=Path, help="write a page here")
    add_config(scan)
    clean = command.add(
        "clean",
        _clean,
        "unlearn what a scan names, scan again, write the model in its own format",
        epilog=_CLEAN_EPILOG,
        exit_error=EXIT_NOT_SCANNED,
    )
    _add_model(clean, CleanSettings)
    clean.add_argument("--out", type=Path, required=True, help="the cleaned model's file")
    add_json(clean)
    add_options(clean, CleanSettings, {"rounds": "unlearn and scan again so often at most"})
    add_config(clean)
    inspect = command.add(
        "inspect",
        _inspect,
        "which images of a folder carry a watermark or act like a trigger?",
        epilog=_INSPECT_EPILOG,
    )
    inspect.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    inspect.add_argument(
        "--extractor",
        type=Path,
        action="append",
        required=True,
        metavar="FILE.onnx",
        help="an exported detector or filter; may be given several times",
    )
    inspect.add_argument("--csv", type=Path, help="write a row for every file here")
    add_json(inspect)
    inspect.add_argument("--html", type=Path, help="write a page of what is flagged here")
    inspect.add_argument("--batch-size", type=int, default=64, help="default: 64")


def _add_model(parser: Parser, settings: type) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="ONNX, safetensors, or a weights-only .pth"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of clean images")
    add_labels(parser)
    add_options(parser, settings, {"count": "images to use"})
    group = parser.add_argument_group("how the model is opened (what is left out is found out)")
    group.add_argument("--arch", help="an architecture of torchvision or timm, for bare weights")
    group.add_argument("--classes", type=int, help="number of classes")
    group.add_argument("--image-size", type=int, help="side of its images, in pixels")
    group.add_argument("--grey", action="store_true", help="it takes one channel")
    for name in ("--mean", "--std"):
        group.add_argument(
            name, type=comma_list(float), metavar="A,B,C", help="of its normalisation"
        )
    group.add_argument(
        "--allow-torchscript", action="store_true", help="open TorchScript, in a sandbox"
    )
    group = parser.add_argument_group("the scan")
    helps = {
        "detectors": "their names (default: nc,reverse)",
        "preset": "of the detectors; fast is calibrated",
        "alpha": "false-positive rate of the verdict",
    }
    add_options(group, settings, helps)
    group.add_argument("--minutes", type=positive, help="break off after so many minutes")
    group.add_argument(
        "--state", type=Path, help="keep the scans' state in this folder, and go on from it"
    )


def _scan(args: argparse.Namespace) -> int:
    from wm_eval.audit.outputs import About, to_json, to_sarif, told, write_html
    from wm_eval.audit.scan import longest_minutes
    from wm_inject.core.files import write_json

    settings = read_settings(args, ScanSettings())
    if args.print_config:
        return print_config(settings)
    try:
        opened, clean, checked = _open(args, settings)
    except (ValueError, RuntimeError) as error:
        # A report that says why there is no verdict, for programs that read it.
        about = About(args.model.name, "", {}, {"used": 0, "skipped": []}, (), ())
        reason = " ".join(str(error).split())
        write_results(args, to_json(about, None, reason))
        if args.sarif is not None:
            write_json(args.sarif, to_sarif(about, None, reason))
        raise
    about = _about(args, settings, opened, clean, checked)
    longest = longest_minutes(checked, clean, opened.num_classes)
    sys.stderr.write(f"at most {max(1, round(longest))} minutes, usually much less\n")
    report = _audit(args, settings, checked, clean)
    print(told(about, report))
    write_results(args, to_json(about, report))
    if args.sarif is not None:
        write_json(args.sarif, to_sarif(about, report))
    if args.html is not None:
        write_html(args.html, about, report, clean.images)
    return report.verdict.exit_code


def _clean(args: argparse.Namespace) -> int:
    from wm_eval.audit.cleaning import clean_in_rounds, success, write_like
    from wm_eval.audit.scan import reversed_triggers

    settings = read_settings(args, CleanSettings())
    if args.print_config:
        return print_config(settings)
    opened, clean, checked = _open(args, settings)
    before = _audit(args, settings, checked, clean, "before")
    print(f"before: {before.verdict}. {before.reason}")
    triggers = reversed_triggers(before)
    if not triggers:
        raise ValueError("not cleaned: the scan named no label")
    images = clean.images
    labels = _predictions(checked, clean) if checked.labels is None else checked.labels
    last, rounds = None, []
    for last in clean_in_rounds(
        checked,
        clean,
        before,
        labels,
        scan=lambda model, folder: _audit(args, settings, model, clean, folder),
        rounds=settings.rounds,
        seed=settings.seed,
    ):
        print(f"round {last.number}: {last.audit.verdict}. {last.audit.reason}")
        rounds.append(_verdict(last.audit))
    assert last is not None
    module = last.checked.module
    rates = (success(checked.module, triggers, images), success(module, triggers, images))
    for label in triggers:
        change = f"{rates[0][label]:.4f} -> {rates[1][label]:.4f}"
        print(f"reversed trigger of label {label}: success {change}")
    same = float((_predictions(last.checked, clean) == labels).double().mean())
    print(f"answers as before on clean images: {same:.4f} of {len(images)}")
    metadata = {
        "cleaned": list(last.labels),
        "from_sha256": opened.sha256,
        "seed": settings.seed,
    }
    results = {
        "before": _verdict(before),
        "rounds": rounds,
        "success": {label: [rate[label] for rate in rates] for label in triggers},
        "same_answers": same,
        "images": len(images),
    }
    write_results(args, metadata | results)
    print(write_like(module, opened, images[:8], args.out, metadata))
    return last.audit.verdict.exit_code


def _inspect(args: argparse.Namespace) -> None:
    from wm_eval.audit.inspect import inspect_folder, write_csv, write_page
    from wm_inject.core.image_files import LeftOut, describe, find_images, refuse_unread
    from wm_inject.core.labelled_folder import listed
    from wm_inject.core.text import escape

    found = find_images(args.images)
    scanner, rows = inspect_folder(
        found, args.extractor, device=args.device, batch_size=args.batch_size
    )
    unread = [LeftOut(row.file, row.error) for row in rows if row.error is not None]
    for row in rows:
        if row.flagged:
            print(f"flagged  {escape(row.file)}")
        elif row.error is not None:
            print(f"unread   {escape(row.file)}: {row.error}")
    flagged, count = sum(row.flagged for row in rows), len(rows) - len(unread)
    rate = f"clean ones at a rate of at most {scanner.false_positive_rate:g}"
    print(f"{flagged} of {count} images are flagged ({rate}), {len(unread)} unread")
    if found.left_out:
        print(f"not looked at: {describe(found.left_out)}")
    if args.csv is not None:
        write_csv(args.csv, scanner, rows)
    images = [row._asdict() | {"file": escape(row.file)} for row in rows]
    write_results(args, {"images": images, "left_out": listed(found.left_out)})
    if args.html is not None:
        title = f"Images of {escape(args.images.name)}"
        write_page(args.html, scanner, rows, title, found.left_out)
    refuse_unread(unread, len(rows), skip=True)


def _open(
    args: argparse.Namespace, settings: ScanSettings | CleanSettings
) -> tuple[OpenedModel, CleanImages, Checked]:
    from wm_eval.audit.checks import check_model
    from wm_eval.audit.images import read_clean
    from wm_victim.loading import open_model

    opened = open_model(
        args.model,
        arch=args.arch,
        num_classes=args.classes,
        image_size=args.image_size,
        channels=1 if args.grey else None,
        mean=args.mean,
        std=args.std,
        allow_torchscript=args.allow_torchscript,
    )
    clean = read_clean(
        args.images,
        size=opened.image_size,
        channels=opened.channels,
        count=settings.count,
        labels=args.labels,
        seed=settings.seed,
    )
    say(clean.lines())
    checked = check_model(
        opened.module, clean, num_classes=opened.num_classes, guess_scale=args.mean is None
    )
    return opened, clean, checked


def _audit(
    args: argparse.Namespace,
    settings: ScanSettings | CleanSettings,
    checked: Checked,
    clean: CleanImages,
    folder: str = "",
) -> Audit:
    from wm_eval.audit.scan import audit

    return audit(
        checked,
        clean,
        detectors=settings.detectors,
        preset=settings.preset,
        alpha=settings.alpha,
        seed=settings.seed,
        minutes=args.minutes,
        state=None if args.state is None else args.state / folder,
        say=lambda line: print(line, file=sys.stderr),
    )


def _about(
    args: argparse.Namespace,
    settings: ScanSettings,
    opened: OpenedModel,
    clean: CleanImages,
    checked: Checked,
) -> About:
    from wm_eval.audit.outputs import About

    names = ("source", "arch", "image_size", "channels", "num_classes", "layout", "outputs")
    model: dict[str, Any] = {name: getattr(opened, name) for name in names}
    images = clean.facts() | {"seed": settings.seed}
    return About(args.model.name, opened.sha256, model, images, checked.checks, opened.notes)


def _predictions(checked: Checked, clean: CleanImages) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([checked.module(part).argmax(1) for part in clean.images.split(64)])


def _verdict(audit: Audit) -> dict[str, str]:
    return {"verdict": audit.verdict, "reason": audit.reason}
