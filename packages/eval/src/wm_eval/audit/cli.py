"""The commands about models and images of strangers: ``scan``, ``clean`` and ``inspect``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_eval.audit.settings import CleanSettings, ScanSettings
from wm_inject.command.common import add_json, run_cli, write_found
from wm_inject.command.config import layered, print_config, read_config, take_over

if TYPE_CHECKING:
    from wm_eval.audit.checks import Checked
    from wm_eval.audit.images import CleanImages
    from wm_eval.audit.outputs import About
    from wm_eval.audit.scan import Audit
    from wm_victim.loading import OpenedModel

NOT_SCANNED = 3
SCAN_HELP = "is a stranger's model backdoored? a verdict as the exit code"
CLEAN_HELP = "unlearn what a scan names, scan again, write the model as it came"
INSPECT_HELP = "which images of a folder carry a watermark or act like a trigger?"
SCAN_EPILOG = """\
examples:
  wm-eval scan model.onnx --images clean/ --html audit.html
  wm-eval scan weights.safetensors --arch resnet18 --images clean/ --json audit.json --minutes 30
  wm-eval scan victim.safetensors --images clean/ --labels labels.csv --sarif audit.sarif

The exit code is the verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (a file or images
that cannot be used), 64 wrong usage. No code of the model's file runs in this process. Class
folders or a CSV file with the columns file and label tell the true classes; without them the
model's own answers are used.
"""
CLEAN_EPILOG = """\
examples:
  wm-eval clean model.onnx --images clean/ --out cleaned.onnx

It exits with the verdict on the cleaned model, as "scan" does, and 3 if nothing was cleaned. What
the second scan still names is unlearned as well, and so on. The cleaned file takes images in
[0, 1].
"""
INSPECT_EPILOG = """\
examples:
  wm-eval inspect incoming/ --extractor detector.onnx --csv found.csv --html found.html

The exit code is 0 whatever is flagged, and 1 after an error.
"""


def add_scan(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of ``wm-eval scan``."""
    _add_model(parser)
    add_json(parser, "write everything that was found here as JSON")
    parser.add_argument("--sarif", type=Path, help="write a SARIF 2.1.0 log here")
    parser.add_argument("--html", type=Path, help="write a page here")


def add_clean(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of ``wm-eval clean``."""
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="the cleaned model's file")
    add_json(parser)
    parser.add_argument(
        "--rounds", type=int, help="unlearn and scan again so often at most (default: 3)"
    )


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of ``wm-eval inspect``."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images")
    parser.add_argument(
        "--extractor",
        type=Path,
        action="append",
        required=True,
        metavar="FILE.onnx",
        help="an exported detector or filter; may be given several times",
    )
    parser.add_argument("--csv", type=Path, help="write a row for every file here")
    add_json(parser)
    parser.add_argument("--html", type=Path, help="write a page of what is flagged here")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="ONNX, safetensors, or a weights-only .pth"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of clean images")
    parser.add_argument("--labels", type=Path, help="CSV file with the columns file and label")
    parser.add_argument("--count", type=int, help="images to use (default: 500)")
    opening = parser.add_argument_group("how the model is opened (what is left out is found out)")
    opening.add_argument("--arch", help="an architecture of torchvision or timm, for bare weights")
    opening.add_argument("--classes", type=int, help="number of classes")
    opening.add_argument("--image-size", type=int, help="side of its images, in pixels")
    opening.add_argument("--grey", action="store_true", help="it takes one channel")
    opening.add_argument("--mean", type=_numbers, metavar="A,B,C", help="of its normalisation")
    opening.add_argument("--std", type=_numbers, metavar="A,B,C", help="of its normalisation")
    opening.add_argument(
        "--allow-torchscript", action="store_true", help="open TorchScript, in a sandbox"
    )
    scanning = parser.add_argument_group("the scan")
    scanning.add_argument("--detectors", type=_listed, help="default: nc,reverse")
    scanning.add_argument("--preset", help="default: fast, which is calibrated")
    scanning.add_argument(
        "--alpha", type=float, help="share of clean models that may be accused (default: 0.05)"
    )
    scanning.add_argument("--minutes", type=float, help="break off after so many minutes")
    scanning.add_argument(
        "--state", type=Path, help="keep the scans' state in this folder, and go on from it"
    )


def scan_command(args: argparse.Namespace) -> int:
    """Scan a model; the exit code is the verdict's."""
    return _verdict(args, ScanSettings(), _scan)


def clean_command(args: argparse.Namespace) -> int:
    """Clean a model; the exit code is the verdict on what came of it."""
    return _verdict(args, CleanSettings(), _clean)


def _verdict(args: argparse.Namespace, start: Any, command: Callable[[Any], int]) -> int:
    """Work out the settings, print them or run; the exit code of the verdict."""
    done: list[int] = []

    def work(_: Sequence[str] | None) -> int:
        given = {field.name: getattr(args, field.name) for field in fields(start)}
        settings = layered(args, start, read_config(args), given)
        take_over(args, settings)
        done.append(print_config(settings) if args.print_config else command(args))
        return 0

    code = run_cli(work)
    # An error must not look like a verdict: 1 means "backdoored" here.
    return done[0] if done else NOT_SCANNED if code == 1 else code


def _clean(args: argparse.Namespace) -> int:
    from wm_eval.audit.cleaning import clean_in_rounds, success, write_like
    from wm_eval.audit.scan import reversed_triggers

    opened, clean, checked = _open(args)
    found = _audit(args, checked, clean, "before")
    print(f"before: {found.verdict}. {found.reason}")
    if not reversed_triggers(found):
        raise ValueError("not cleaned: the scan named no label")
    images = clean.images
    answers = _answers(checked, clean)
    last, rounds = None, []
    for last in clean_in_rounds(
        checked,
        clean,
        found,
        answers,
        scan=lambda model, place: _audit(args, model, clean, place),
        rounds=args.rounds,
        seed=args.seed,
    ):
        print(f"round {last.number}: {last.audit.verdict}. {last.audit.reason}")
        rounds.append(_said(last.audit))
    assert last is not None
    module, triggers = last.checked.module, reversed_triggers(found)
    rates = (success(checked.module, triggers, images), success(module, triggers, images))
    for label in triggers:
        change = f"{rates[0][label]:.4f} -> {rates[1][label]:.4f}"
        print(f"reversed trigger of label {label}: success {change}")
    kept = float((_answers(last.checked, clean, own=True) == answers).double().mean())
    print(f"answers as before on clean images: {kept:.4f} of {len(images)}")
    record = {"cleaned": list(last.labels), "from_sha256": opened.sha256, "seed": args.seed}
    success_rates = {label: [rate[label] for rate in rates] for label in triggers}
    told = {"before": _said(found), "rounds": rounds, "success": success_rates}
    write_found(args, record | told | {"same_answers": kept, "images": len(images)})
    print(write_like(module, opened, images[:8], args.out, record))
    return last.audit.verdict.exit_code


def inspect_command(args: argparse.Namespace) -> int:
    """List which images are flagged."""
    from wm_eval.audit.inspect import inspect_folder, write_csv, write_page

    scanner, rows = inspect_folder(
        args.images, args.extractor, device=args.device, batch_size=args.batch_size
    )
    for row in rows:
        if row.flagged:
            print(f"flagged  {row.file}")
        elif row.error is not None:
            print(f"unread   {row.file}: {row.error}")
    flagged, unread = sum(r.flagged for r in rows), sum(r.error is not None for r in rows)
    rate = f"clean ones at a rate of at most {scanner.false_positive_rate:g}"
    print(f"{flagged} of {len(rows) - unread} images are flagged ({rate}), {unread} unread")
    if args.csv is not None:
        write_csv(args.csv, scanner, rows)
    write_found(args, {"images": [row._asdict() for row in rows]})
    if args.html is not None:
        write_page(args.html, scanner, rows, f"Images of {args.images.name}")
    return 0


def _scan(args: argparse.Namespace) -> int:
    from wm_eval.audit.outputs import About, to_json, to_sarif, told, write_html
    from wm_eval.audit.scan import longest_minutes
    from wm_inject.core.files import write_json

    try:
        opened, clean, checked = _open(args)
    except (ValueError, RuntimeError) as error:
        # Machines that read the report are told as well that there is no verdict.
        nothing = About(args.model.name, "", {}, {"used": 0, "skipped": []}, (), ())
        reason = " ".join(str(error).split())
        write_found(args, to_json(nothing, None, reason))
        if args.sarif is not None:
            write_json(args.sarif, to_sarif(nothing, None, reason))
        raise
    about = _about(args, opened, clean, checked)
    longest = longest_minutes(checked, clean, opened.num_classes)
    sys.stderr.write(f"at most {max(1, round(longest))} minutes, usually much less\n")
    found = _audit(args, checked, clean)
    print(told(about, found))
    write_found(args, to_json(about, found))
    if args.sarif is not None:
        write_json(args.sarif, to_sarif(about, found))
    if args.html is not None:
        write_html(args.html, about, found, clean.images)
    return found.verdict.exit_code


def _open(args: argparse.Namespace) -> tuple[OpenedModel, CleanImages, Checked]:
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
        count=args.count,
        labels=args.labels,
        seed=args.seed,
    )
    checked = check_model(
        opened.module, clean, num_classes=opened.num_classes, guess_scale=args.mean is None
    )
    return opened, clean, checked


def _audit(
    args: argparse.Namespace, checked: Checked, clean: CleanImages, place: str = ""
) -> Audit:
    from wm_eval.audit.scan import audit

    return audit(
        checked,
        clean,
        detectors=args.detectors,
        preset=args.preset,
        alpha=args.alpha,
        seed=args.seed,
        minutes=args.minutes,
        state=None if args.state is None else args.state / place,
        say=_say,
    )


def _about(
    args: argparse.Namespace, opened: OpenedModel, clean: CleanImages, checked: Checked
) -> About:
    from wm_eval.audit.outputs import About, rows_of

    names = ("source", "arch", "image_size", "channels", "num_classes", "layout", "outputs")
    model: dict[str, Any] = {name: getattr(opened, name) for name in names}
    images = {"used": len(clean.files), "skipped": rows_of(clean.skipped), "seed": args.seed}
    return About(args.model.name, opened.sha256, model, images, checked.checks, opened.notes)


def _answers(checked: Checked, clean: CleanImages, *, own: bool = False) -> Any:
    """The true labels where they are known and wanted, else the model's own answers."""
    import torch

    if checked.labels is not None and not own:
        return checked.labels
    with torch.no_grad():
        return torch.cat([checked.module(part).argmax(1) for part in clean.images.split(64)])


def _said(found: Audit) -> dict[str, str]:
    return {"verdict": found.verdict, "reason": found.reason}


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as 0.5,0.5, got {text!r}") from None


__all__ = [
    "CLEAN_EPILOG",
    "CLEAN_HELP",
    "INSPECT_EPILOG",
    "INSPECT_HELP",
    "SCAN_EPILOG",
    "SCAN_HELP",
    "add_clean",
    "add_inspect",
    "add_scan",
    "clean_command",
    "inspect_command",
    "scan_command",
]
