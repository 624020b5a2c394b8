"""What the command lines of both defences share: their inputs, the printed table, the exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wm_inject.command.common import add_json, resolve_device, run_cli, write_found
from wm_inject.command.config import layered, read_config, refuse_preset

if TYPE_CHECKING:
    from torch import nn

    from defense_nc.verdict.report import ScanReport
    from wm_victim import Dataset, ImageSet
    from wm_victim.models import Classifier

T = TypeVar("T")


@dataclass(frozen=True)
class ScanSettings:
    """What the ``scan`` command of a defence does with a classifier.

    Args:
        scan: The settings of the search: `NCConfig` or ``ReverseConfig``.
        images: Clean images to scan with.
        alpha: Share of clean models that may be accused, in (0, 1).
        max_ratio: Accuse only below this share of the median, in (0, 1].
        filter_rate: Share of clean images that the filter of --filter may flag.
        seed: Of every draw.
    """

    scan: Any
    images: int = 500
    alpha: float = 0.05
    max_ratio: float = 0.5
    filter_rate: float = 0.01
    seed: int = 0


def add_inputs(parser: argparse.ArgumentParser, *, presets: Sequence[str]) -> None:
    """Give a parser what every scan takes: a classifier, clean images, a preset and the rule.

    Args:
        parser: The parser of one command.
        presets: Names of presets; "fast" must be among them.
    """
    parser.add_argument(
        "classifier", type=Path, metavar="CLASSIFIER", help="a file that `wm-victim train` wrote"
    )
    parser.add_argument(
        "--data",
        required=True,
        help="clean images: digits, mnist, fashion-mnist, cifar10, gtsrb, a folder, or an .npz",
    )
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument("--images", type=int, help="images to scan with (default: 500)")
    parser.add_argument(
        "--preset",
        choices=tuple(presets),
        help="of the search (default: fast, whose verdicts are calibrated)",
    )
    parser.add_argument(
        "--alpha", type=float, help="share of clean models that may be accused (default: 0.05)"
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        help="accuse only below this share of the median (default: 0.5)",
    )
    add_json(parser)


def scan_settings(
    args: argparse.Namespace, start: T, more: Mapping[str, Any], **presets: Callable[[str], Any]
) -> T:
    """The settings of a command that scans: where they start, the file, the options.

    Args:
        args: With the options of `add_inputs`.
        start: The command's settings, with the fields of `ScanSettings` but ``filter_rate``.
        more: The values of further options by field name; None is "not given".
        presets: By table, what makes its settings from a preset's name. The option is --recipe
            for the table ``unlearning``, and --preset for ``scan``.

    Raises:
        ValueError: Settings that do not fit.
    """
    file = read_config(args)
    for table, preset in presets.items():
        option = {"scan": "preset", "unlearning": "recipe"}[table]
        refuse_preset(args, option, table, file)
        if (name := getattr(args, option)) is not None:
            start = replace(start, **{table: preset(name)})  # type: ignore[type-var]
    names = ("images", "alpha", "max_ratio", "seed")
    return layered(args, start, file, {**{n: getattr(args, n) for n in names}, **more})


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Give a scan's parser what it may write for services: ONNX files of what was found.

    Args:
        parser: The parser of a ``scan`` command.
    """
    parser.add_argument(
        "--filter",
        type=Path,
        metavar="OUT.onnx",
        help="write a filter for incoming images, for the label that stands out most",
    )
    parser.add_argument(
        "--filter-rate",
        type=float,
        help="share of clean images that the filter may flag (default: 0.01)",
    )
    parser.add_argument(
        "--reversed", type=Path, metavar="OUT.onnx", help="write that label's reversed trigger"
    )


def write_outputs(
    args: argparse.Namespace, report: ScanReport, model: Classifier, known: ImageSet
) -> list[str]:
    """Write what `add_outputs` asked for, and say in lines what was written.

    Args:
        args: With the options of `add_outputs`, and a seed.
        report: What the scan found.
        model: The classifier that was scanned.
        known: The defender's images.

    Raises:
        ValueError: A rate outside its range.
    """
    from defense_nc.discriminant_filter import DiscriminantFilter
    from defense_nc.filter_export import export_filter
    from wm_inject import to_onnx

    if args.filter is None and args.reversed is None:
        return []
    if not report.suspected:
        return ["no file for services: the scan named no label"]
    label = min(report.suspected, key=lambda one: report.labels[one].p_value)
    trigger, lines = report.triggers[label], []
    example = known.images[:8]
    if args.reversed is not None:
        to_onnx(trigger.cpu(), example, args.reversed, uint8=True)
        lines.append(f"wrote {args.reversed}: the reversed trigger of label {label}")
    if args.filter is not None:
        settings = DiscriminantFilter(false_positive_rate=args.filter_rate)
        try:
            found = settings.calibrate(
                model, known.images, triggers={label: trigger}, seed=args.seed
            )
            export_filter(found, example, args.filter)
        except ValueError as error:  # the verdict stands all the same
            lines.append(f"no filter: {error}")
        else:
            what = f"flags images that act like triggers of label {label}"
            lines.append(f"wrote {args.filter}: {what}")
    return lines


def open_inputs(args: argparse.Namespace) -> tuple[Classifier, Dataset, ImageSet]:
    """The classifier, its data, and the defender's few images; model and images on the device.

    Raises:
        ValueError: Files that cannot be read, or data of another shape than the classifier's.
    """
    from wm_victim import defender_subset, load_classifier, load_dataset

    model = load_classifier(args.classifier)
    data = load_dataset(args.data, root=args.root, image_size=model.config["image_size"])
    for name in ("num_classes", "channels"):
        if getattr(data, name) != model.config[name]:
            raise ValueError(
                f"expected data with {name} {model.config[name]}, as the classifier was trained "
                f"on, got {getattr(data, name)} in {data.name}"
            )
    device = resolve_device(args.device)
    known = defender_subset(data.train, count=args.images, seed=args.seed)
    return model.to(device), data, known.to(device)


def verdict_code(scan: Callable[[], ScanReport | None]) -> int:
    """Run a scan and return its verdict's exit code; 3, "not scanned", after an error.

    An error must not look like a verdict: 1 means "backdoored" here. None, of a command that only
    printed its settings, is 0.
    """
    done: list[ScanReport | None] = []

    def attempt(_: Sequence[str] | None) -> int:
        done.append(scan())
        return 0

    code = run_cli(attempt)
    if done:
        return 0 if done[0] is None else done[0].verdict.exit_code
    return 3 if code == 1 else code


def write_cleaned(
    args: argparse.Namespace,
    models: tuple[nn.Module, nn.Module],
    triggers: Mapping[int, nn.Module],
    data: Dataset,
    about: Mapping[str, Any],
    *,
    report: ScanReport | None,
    what: str,
) -> list[str]:
    """Save a cleaned classifier, and write what became of accuracy and triggers.

    Args:
        args: With ``out`` and the option of `add_json`.
        models: Before and after cleaning, on one device.
        triggers: What was unlearned, by label, on that device.
        data: Its test images are what both are measured on.
        about: What was done, for the classifier's file and for --json.
        report: The scan that named the labels; None if there was none.
        what: Is reversed: "trigger" or "generator".

    Returns:
        Lines for the terminal.
    """
    from wm_victim import accuracy, attack_success, save_classifier

    after = models[1]
    device = next(after.parameters()).device
    about = {**about, "fingerprint": data.fingerprint}
    save_classifier(after.cpu(), args.out, about)
    after.to(device)
    test = data.test.to(device)
    rates = [accuracy(net, test) for net in models]
    lines = [f"accuracy {rates[0]:.4f} -> {rates[1]:.4f}"]
    success = {}
    for label, trigger in triggers.items():
        success[label] = [attack_success(net, test, trigger, target=label) for net in models]
        before, now = success[label]
        lines.append(f"reversed {what} of label {label}: success {before:.4f} -> {now:.4f}")
    scan = None if report is None else report.to_dict()
    write_found(args, {**about, "accuracy": rates, "success": success, "scan": scan})
    return [*lines, f"wrote {args.out}"]


def report_table(report: ScanReport) -> str:
    """A scan for the terminal: a line a label, both rules, the verdict and its reason."""
    lines = ["label     score  ratio  success        p  paper index"]
    for row in report.labels:
        named = " <- suspected" if row.label in report.suspected else ""
        missed = "" if row.converged else " (not reached)"
        lines.append(
            f"{row.label:5d} {row.score:9.4g} {row.ratio:6.2f} {row.success_rate:8.3f} "
            f"{row.p_value:8.2g} {row.paper_index:12.2f}{named}{missed}"
        )
    flagged = ", ".join(map(str, report.paper_flagged)) or "none"
    named = ", ".join(map(str, report.suspected)) or "none"
    return "\n".join(
        [
            *lines,
            f"default rule: p {report.p_value:.2g} (alpha {report.alpha:g}), suspected: {named}",
            f"paper's rule: index {report.paper_index:.2f}, with the lower median "
            f"{report.paper_index_low:.2f}; flagged (> 2): {flagged}",
            f"verdict: {report.verdict.value}. {report.reason}",
        ]
    )


__all__ = [
    "ScanSettings",
    "add_inputs",
    "add_outputs",
    "open_inputs",
    "report_table",
    "scan_settings",
    "verdict_code",
    "write_cleaned",
    "write_outputs",
]
