"""Untrusted models and images, one sub-command each.

``scan``, ``clean``, ``graph``, ``calibrate``, ``filter`` and ``inspect``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wm_eval.audit.cli_graph import add_graph, judge, look_before_scan, with_graph
from wm_eval.audit.open_options import add_open_options, check_open_options, open_options
from wm_eval.audit.settings import AUTO, CleanSettings, FilterSettings, ScanSettings
from wm_eval.audit.stated import add_reading_options, read_stated
from wm_inject.command.common import (
    EXIT_NOT_SCANNED,
    CommandLine,
    Parser,
    add_json,
    resolve_device,
    write_results,
)
from wm_inject.command.config import add_config, add_options, print_config, read_settings
from wm_inject.command.folders import add_labels, say
from wm_inject.command.values import output_file, output_folder, positive, within
from wm_inject.core.errors import error_line
from wm_inject.core.text import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from defense_nc import Calibration
    from wm_eval.audit.budget import Budget
    from wm_eval.audit.checks import Checked
    from wm_eval.audit.conclusion import Audit
    from wm_eval.audit.images import CleanImages
    from wm_eval.audit.outputs import About
    from wm_inject.core.image_size import ImageSize
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

  wm-eval clean model.onnx --images clean/ --label 3 --out cleaned.onnx

Labels that stand out are cleaned, also where the verdict is "inconclusive", or the one that --label
names. What the second scan still names is unlearned as well, and so on. It exits with the verdict
on the cleaned model, as "scan" does, and with 3 if nothing was cleaned: then nothing is written.
The cleaned file takes and gives what the original did.
"""
_CALIBRATE_EPILOG = """\
examples:
  wm-eval scan clean-1.onnx --images clean/ --json clean-1.json     # and so on, 20 or more
  wm-eval calibrate clean-*.json --out own.json
  wm-eval scan suspect.onnx --images clean/ --calibration own.json

The models must be clean, and like those that are to be judged. Scan them with the detectors and the
number of images that you will use.
"""
_FILTER_EPILOG = """\
examples:
  wm-eval filter model.onnx --images clean/ --out filter.onnx
  wm-eval inspect incoming/ --extractor filter.onnx

It needs no scan, and no backdoor that is known: it flags images that the model does not treat as it
treats clean ones. Half of the images choose the threshold.
"""
_INSPECT_EPILOG = """\
examples:
  wm-eval inspect incoming/ --extractor detector.onnx --csv found.csv --html found.html

The exit code is 0 whatever is flagged, and 1 after an error or if no image could be read.
"""


def add_audit(command: CommandLine) -> None:
    """Add the sub-commands."""
    scan = command.add(
        "scan",
        _scan,
        "is an untrusted model backdoored? a verdict as the exit code",
        epilog=_SCAN_EPILOG,
        exit_error=EXIT_NOT_SCANNED,
    )
    _add_model(scan, ScanSettings)
    _add_scan(scan, ScanSettings)
    add_json(scan, "write the whole report here as JSON")
    scan.add_argument("--sarif", type=output_file, help="write a SARIF 2.1.0 log here")
    scan.add_argument("--html", type=output_file, help="write a page here")
    add_config(scan)
    clean = command.add(
        "clean",
        _clean,
        "unlearn what a scan names, scan again, write the model in its own format",
        epilog=_CLEAN_EPILOG,
        exit_error=EXIT_NOT_SCANNED,
    )
    _add_model(clean, CleanSettings)
    _add_scan(clean, CleanSettings)
    clean.add_argument("--out", type=output_file, required=True, help="the cleaned model's file")
    clean.add_argument(
        "--label",
        type=within(int, "[0, inf)"),
        help="clean this label, whatever the scan says (default: all that stand out)",
    )
    add_json(clean)
    helps = {
        "rounds": "unlearn and scan again so often at most",
        "max_loss": "write nothing if more of the accuracy is lost",
    }
    add_options(clean, CleanSettings, helps)
    add_config(clean)
    add_graph(command)
    calibrate = command.add(
        "calibrate",
        _calibrate,
        "a null distribution for verdicts, from scans of clean models of your own",
        epilog=_CALIBRATE_EPILOG,
    )
    calibrate.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT.json", help="what scan --json wrote"
    )
    calibrate.add_argument("--preset", default="fast", help="of the scans (default: fast)")
    calibrate.add_argument("--out", type=output_file, required=True, help="write it here, as JSON")
    add_json(calibrate)
    screen = command.add(
        "filter",
        _filter,
        "write a filter for incoming images, as ONNX; it needs no scan",
        epilog=_FILTER_EPILOG,
    )
    _add_model(screen, FilterSettings)
    screen.add_argument("--out", type=output_file, required=True, help="the filter's file")
    add_json(screen)
    helps = {
        "method": "layer-ranks, or parameter-scaling for models with batch normalisation",
        "rate": "share of clean images that it may flag",
    }
    add_options(screen, FilterSettings, helps)
    add_config(screen)
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
    inspect.add_argument("--csv", type=output_file, help="write a row for every file here")
    add_json(inspect)
    inspect.add_argument("--html", type=output_file, help="write a page of what is flagged here")
    inspect.add_argument(
        "--batch-size", type=within(int, "[1, 65536]"), default=64, help="default: 64"
    )


def _add_model(parser: Parser, settings: type) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="ONNX, safetensors, or a weights-only .pth"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of clean images")
    add_labels(parser)
    add_options(parser, settings, {"count": "images to use, at most"})
    add_open_options(parser)
    add_reading_options(parser)


def _add_scan(parser: Parser, settings: type) -> None:
    group = parser.add_argument_group("the scan")
    helps = {
        "detectors": "their names; auto: head,uap,sweep,warp where calibrated for such a model",
        "preset": "of the detectors; fast is calibrated",
        "alpha": "false-positive rate of the verdict",
    }
    add_options(group, settings, helps)
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='judge by what "wm-eval calibrate" wrote (default: what ships)',
    )
    group.add_argument(
        "--minutes", type=positive, help="break the whole command off after so many minutes"
    )
    group.add_argument(
        "--state",
        type=output_folder,
        help="keep the scans' state in this folder, and go on from it",
    )


def _scan(args: argparse.Namespace) -> int:
    from wm_eval.audit.budget import Budget

    settings = read_settings(args, ScanSettings())
    if args.print_config:
        return print_config(settings)
    check_open_options(args)
    budget = Budget(args.minutes)
    from defense_nc.verdict import MIN_CONVERGED
    from wm_eval.audit.conclusion import not_scanned
    from wm_eval.audit.outputs import About, verdict_lines
    from wm_eval.audit.scan import foreseen, longest_minutes
    from wm_eval.titles import AUDIT, detector_title

    about = About(args.model.name)
    images = graph = None
    try:
        with budget.enforced():
            graph = look_before_scan(args)
            if graph is not None:
                _print("the graph's branches: {}. {}".format(*judge(graph)))
            subject = _open(args, settings, about)
            images = subject.clean.images
            parts = (subject.checked, subject.clean, subject.opened.num_classes)
            names, preset = subject.detectors, settings.preset
            offered = (tuple(subject.own) or AUDIT) if settings.detectors == AUTO else names
            longest = longest_minutes(*parts, detectors=names, preset=preset)
            certain = foreseen(*parts, detectors=offered, preset=preset, own=subject.own)
        lines = []
        for name, reason in certain.items():
            what = "will abstain, whatever it finds; labels that stand out are listed."
            if name not in names:
                what = f"would abstain, and is left out (--detectors {name})."
            lines.append(f"{detector_title(name)} {what} {reason}")
        if not subject.own and subject.opened.num_classes < MIN_CONVERGED:
            lines.append("of two or three classes few backdoors stand out: clean says less there.")
        about.notes = (*about.notes, *lines)
        _print(*(f"note: {line}" for line in lines))
        for name in names:
            _say(f"{detector_title(name)}: at most {max(1, round(longest[name]))} minutes")
        report = with_graph(_audit(args, settings, subject, subject.checked, budget), graph)
    except Exception as error:
        # A report that says why there is no verdict, for programs that read it.
        report = with_graph(not_scanned(error_line(error), settings.alpha), graph)
        if graph is None or not graph.steering:
            _write_reports(args, about, report, images)
            raise
    print("\n".join(verdict_lines(report)))
    _write_reports(args, about, report, images)
    return report.verdict.exit_code


def _write_reports(
    args: argparse.Namespace, about: About, report: Audit, images: Tensor | None
) -> None:
    from wm_eval.audit.outputs import to_json, to_sarif, write_html
    from wm_inject.core.files import write_json

    errors: list[OSError] = []
    for path, write in (
        (args.json, lambda path: write_json(path, to_json(about, report))),
        (args.sarif, lambda path: write_json(path, to_sarif(about, report))),
        (args.html, lambda path: write_html(path, about, report, images)),
    ):
        try:
            if path is not None:
                write(path)
        except OSError as error:  # the others may lie elsewhere
            errors.append(error)
    if errors:
        raise errors[0]


def _clean(args: argparse.Namespace) -> int:
    from wm_eval.audit.budget import Budget

    settings = read_settings(args, CleanSettings())
    if args.print_config:
        return print_config(settings)
    check_open_options(args)
    budget = Budget(args.minutes)
    from wm_eval.audit.cleaned_file import CleanedFile
    from wm_eval.audit.cleaning import answers_of, clean_in_rounds, labels_to_clean, success
    from wm_eval.audit.outputs import About
    from wm_eval.audit.scan import reversed_triggers

    about = About(args.model.name)
    with budget.enforced():
        subject = _open(args, settings, about)
        opened, checked, clean = subject.opened, subject.checked, subject.clean
        if args.label is not None and args.label >= opened.num_classes:
            raise ValueError(f"expected --label in 0 .. {opened.num_classes - 1}, got {args.label}")
        file = CleanedFile(
            args.model, args.out, opened, checked.module, clean.images, open_options(args)
        )
        _print(*(f"note: {note}" for note in file.notes))
    before = _audit(args, settings, subject, checked, budget)
    print(f"before: {before.verdict}. {before.reason}", flush=True)
    labels_to_clean(before, args.label)
    last, rounds = None, []
    for last in clean_in_rounds(
        checked,
        clean,
        before,
        scan=lambda model: _audit(args, settings, subject, model, budget),
        label=args.label,
        rounds=settings.rounds,
        max_loss=settings.max_loss,
        seed=settings.seed,
        budget=budget,
        device=subject.device,
    ):
        print(f"round {last.number}: {last.audit.verdict}. {last.audit.reason}", flush=True)
        rounds.append(_verdict(last.audit))
    assert last is not None
    module = last.checked.module
    triggers = reversed_triggers(before, last.labels)
    classes = checked.labels
    if classes is None:
        classes = answers_of(checked.module, clean.images)
    rates = [success(one, triggers, clean.images, classes) for one in (checked.module, module)]
    for label in triggers:
        change = f"{rates[0][label]:.4f} -> {rates[1][label]:.4f}"
        source = triggers[label].source
        whose = "" if source is None else f", on images of label {source}"
        print(f"reversed trigger of label {label}{whose}: success {change}")
    for label in last.refitted:
        print(f"label {label}: unlearned in the last layer, no trigger of it was reversed")
    for label, why in last.obstacles.items():
        print(f"label {label}: not unlearned: {why}")
    print(last.cost)
    metadata = {
        "cleaned": list(last.labels),
        "from_sha256": opened.sha256,
        "seed": settings.seed,
    }
    results = {
        "before": _verdict(before),
        "rounds": rounds,
        "success": {label: [rate[label] for rate in rates] for label in triggers},
        "last_layer": list(last.refitted),
        "obstacles": dict(last.obstacles),
        "accuracy": last.cost.accuracy,
        "same_answers": last.cost.agreement,
        "held_out": last.cost.images,
        "images": len(clean.images),
    }
    print(file.write(module, metadata))
    write_results(args, metadata | results)
    return last.audit.verdict.exit_code


def _calibrate(args: argparse.Namespace) -> None:
    from defense_nc.verdict import write_calibrations
    from wm_eval.audit.own_calibration import fit_reports
    from wm_eval.titles import detector_title

    fitted = fit_reports(args.reports, preset=args.preset)
    for one in fitted:
        count = len(one.calibration.models)
        by_others = "too few to judge each by the others"
        if one.accused is not None:
            by_others = f"judged by the others, {len(one.accused)} would be called backdoored"
            by_others += "".join(f", {path}" for path in one.accused)
        print(f"{detector_title(one.name)}: {count} clean models; {by_others}")
        for path in one.left_out:
            print(f"left out: {path} (too few labels were reached)")
    write_calibrations(args.out, [one.calibration for one in fitted])
    print(f"calibration {args.out}")
    results = {
        one.name: {
            "clean_models": len(one.calibration.models),
            "called_backdoored": one.accused,
            "left_out": one.left_out,
        }
        for one in fitted
    }
    write_results(args, {"detectors": results})


def _filter(args: argparse.Namespace) -> None:
    settings = read_settings(args, FilterSettings())
    if args.print_config:
        print_config(settings)
        return
    check_open_options(args)
    from defense_nc import export_filter
    from wm_eval.audit.outputs import About

    about = About(args.model.name)
    opened, clean, checked, device = _open_model(args, settings, about)
    detector = settings.build().calibrate(
        checked.module.to(device), clean.images.to(device), seed=settings.seed
    )
    parity = export_filter(detector, clean.images[:8], args.out)
    print(
        f"wrote {args.out}: flags at most {settings.rate:g} of clean images, by "
        f"{detector.log['images']} of them (largest difference to the model {parity.max_rel:.1g})"
    )
    results = {
        "method": settings.method,
        "threshold": detector.threshold,
        "from_sha256": opened.sha256,
    }
    write_results(args, results | dict(detector.log))


def _inspect(args: argparse.Namespace) -> None:
    from wm_eval.audit.inspect import inspect_folder, write_csv, write_page
    from wm_inject.core.image_files import LeftOut, describe, find_images, refuse_unread
    from wm_inject.core.labelled_folder import listed
    from wm_inject.core.text import escape

    files = find_images(args.images)
    scanner, rows = inspect_folder(
        files, args.extractor, device=args.device, batch_size=args.batch_size
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
    if files.left_out:
        print(f"not looked at: {describe(files.left_out)}")
    if args.csv is not None:
        write_csv(args.csv, scanner, rows)
    images = [row._asdict() | {"file": escape(row.file)} for row in rows]
    write_results(args, {"images": images, "left_out": listed(files.left_out)})
    if args.html is not None:
        title = f"Images of {escape(args.images.name)}"
        write_page(args.html, scanner, rows, title, files.left_out)
    refuse_unread(unread, len(rows), skip=True)


class _Opened(NamedTuple):
    """A model, and clean images that fit it."""

    opened: OpenedModel
    clean: CleanImages
    checked: Checked
    device: torch.device


class _Subject(NamedTuple):
    """A model, and what to look at it with."""

    opened: OpenedModel
    clean: CleanImages
    checked: Checked
    detectors: tuple[str, ...]
    own: Mapping[str, Calibration]
    device: torch.device


def _open(
    args: argparse.Namespace, settings: ScanSettings | CleanSettings, about: About
) -> _Subject:
    """As `_open_model`, with the detectors that fit."""
    _found(args.model, args.images, args.labels, args.calibration)
    from wm_eval.audit.own_calibration import load_own
    from wm_eval.audit.scan import choose_detectors

    wanted, preset = settings.detectors, settings.preset
    own = {} if args.calibration is None else load_own(args.calibration, preset)
    opened, clean, checked, device = _open_model(args, settings, about)
    detectors = choose_detectors(
        checked, clean, opened.num_classes, wanted=wanted, preset=preset, own=own
    )
    return _Subject(opened, clean, checked, detectors, own, device)


def _found(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.exists():
            raise ValueError(f"expected a file or folder at {path}, found none")


def _open_model(
    args: argparse.Namespace, settings: ScanSettings | CleanSettings | FilterSettings, about: About
) -> _Opened:
    """Open the model, read the images, check both; what becomes known is printed at once."""
    _found(args.model, args.images, args.labels)
    device = resolve_device(args.device)
    from wm_eval.audit.checks import check_model, choose_size
    from wm_eval.audit.images import common_size, read_clean
    from wm_eval.audit.outputs import check_line, model_line
    from wm_victim.loading import open_model

    opened = open_model(args.model, **open_options(args))
    about.sha256, about.notes = opened.sha256, opened.notes
    names = ("source", "arch", "image_size", "channels", "num_classes", "layout", "outputs")
    about.model = {name: getattr(opened, name) for name in names}
    _print(model_line(about), *(f"note: {note}" for note in opened.notes))
    stated = read_stated(args, opened)

    def read(size: ImageSize, count: int | None) -> CleanImages:
        clean = read_clean(
            args.images,
            size=size,
            channels=opened.channels,
            count=min(settings.count, count or settings.count),
            labels=args.labels,
            seed=settings.seed,
        )
        return replace(clean, labels=None) if args.unlabelled else clean

    is_open = len(opened.image_sizes) > 1
    own_size = common_size(args.images, labels=args.labels) if is_open else None
    opened, clean = choose_size(opened, read, stated, own_size=own_size)
    _print(*(f"note: {note}" for note in opened.notes[len(about.notes) :]))
    about.notes, about.model["image_size"] = opened.notes, opened.image_size
    say(clean.lines())
    about.images = clean.facts() | {"seed": settings.seed}
    checked = check_model(opened.module, clean, num_classes=opened.num_classes, stated=stated)
    about.checks = checked.checks
    _print(*map(check_line, checked.checks))
    if device.type != "cpu" and (why := _stays_on_cpu(checked, clean, device)):
        if args.device != "auto":
            raise ValueError(f"--device {args.device}: the model does not run there: {why}")
        device = resolve_device("cpu")
        about.notes = (*about.notes, f"scanned on the CPU: {why}")
        _print(f"note: {about.notes[-1]}")
    return _Opened(opened, clean, checked, device)


def _stays_on_cpu(checked: Checked, clean: CleanImages, device: torch.device) -> str | None:
    """Why a model cannot be computed on a device; None if it gives the same answers there."""
    import copy

    import torch

    images = clean.images[:8]
    try:
        with torch.no_grad():
            there = copy.deepcopy(checked.module).to(device)(images.to(device)).cpu()
            here = checked.module(images)
    except RuntimeError as error:  # imported graphs may hold constants that stay on the CPU
        return first_line(error)
    same = float((there - here).abs().max()) <= 1e-2 * float(here.abs().max())
    return None if same else "it computes something else there"


def _audit(
    args: argparse.Namespace,
    settings: ScanSettings | CleanSettings,
    subject: _Subject,
    checked: Checked,
    budget: Budget,
) -> Audit:
    from wm_eval.audit.scan import audit

    return audit(
        checked,
        subject.clean,
        detectors=subject.detectors,
        preset=settings.preset,
        alpha=settings.alpha,
        seed=settings.seed,
        own=subject.own,
        budget=budget,
        state=args.state,
        device=None if subject.device.type == "cpu" else subject.device,  # None copies nothing
        say=_say,
    )


def _print(*lines: str) -> None:
    """Lines on stdout, kept even if the command is interrupted."""
    if lines:
        print("\n".join(lines), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _verdict(audit: Audit) -> dict[str, Any]:
    return {"verdict": audit.verdict, "reason": audit.reason, "outliers": list(audit.outliers)}
