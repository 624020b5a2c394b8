"""The ``defense-nc`` command: scan a classifier with Neural Cleanse, and clean one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from defense_nc.__about__ import __version__
from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli

if TYPE_CHECKING:
    from torch import nn

    from defense_nc.report import ScanReport
    from wm_victim import Dataset, ImageSet
    from wm_victim.models import Classifier

_EPILOG = """\
examples:
  defense-nc scan victim.safetensors --data digits --images 200 --preset fast --json scan.json
  defense-nc unlearn victim.safetensors --data digits --label 0 --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `unlearn` 0, or 1 after an error."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "unlearn":
        return _unlearn(args)
    done: list[ScanReport] = []

    def attempt(_: Sequence[str] | None) -> int:
        done.append(_scan(args))
        return 0

    code = run_cli(attempt)
    if done:
        return done[0].verdict.exit_code
    # An error must not look like a verdict: 1 means "backdoored" here, 3 "not scanned".
    return 3 if code == 1 else code


def _parser() -> Parser:
    parser = Parser(
        prog="defense-nc",
        description="Look for a backdoor in an image classifier with Neural Cleanse, and clean it.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"defense-nc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser("scan", help="is there a backdoor?", epilog=_EPILOG)
    _add_inputs(scan)
    scan.add_argument("--json", type=Path, help="also write the report here")
    add_common(scan, version=__version__)
    unlearn = commands.add_parser("unlearn", help="clean a label that a scan names", epilog=_EPILOG)
    _add_inputs(unlearn)
    unlearn.add_argument("--label", type=int, help="clean this label (default: all named)")
    unlearn.add_argument("--force", action="store_true", help="clean --label without a scan")
    unlearn.add_argument(
        "--recipe", choices=("nc", "paper", "reverse"), default="nc", help="(default: nc)"
    )
    unlearn.add_argument("--out", type=Path, required=True, help="the cleaned classifier's file")
    add_common(unlearn, version=__version__)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    parser.add_argument(
        "--data",
        required=True,
        help="clean images: digits, mnist, fashion-mnist, cifar10, gtsrb, a folder, or an .npz",
    )
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument("--images", type=int, default=200, help="clean images used (default: 200)")
    parser.add_argument("--preset", choices=("paper", "ports", "robust", "fast"), default="robust")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="share of clean models that may be accused"
    )
    parser.add_argument(
        "--max-ratio", type=float, default=0.5, help="accuse only below this share of the median"
    )


def _open(args: argparse.Namespace) -> tuple[Classifier, Dataset, ImageSet]:
    """The classifier, its data and the defender's few images, on the device."""
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


def _report(args: argparse.Namespace, model: nn.Module, known: ImageSet) -> ScanReport:
    from defense_nc.scan import scan
    from defense_nc.schedule import NCConfig

    return scan(
        model,
        known.images,
        labels=known.labels,
        config=NCConfig.preset(args.preset),
        alpha=args.alpha,
        max_ratio=args.max_ratio,
        seed=args.seed,
    )


def _scan(args: argparse.Namespace) -> ScanReport:
    from wm_inject.files import write_json

    model, data, known = _open(args)
    report = _report(args, model, known)
    if args.json is not None:
        about = {"classifier": args.classifier.name, "data": data.name, "preset": args.preset}
        write_json(args.json, report.to_dict() | about | {"fingerprint": data.fingerprint})
    print(_table(report))
    return report


def _table(report: ScanReport) -> str:
    lines = ["label   score  ratio  success        p  paper index"]
    for row in report.labels:
        named = " <- suspected" if row.label in report.suspected else ""
        missed = "" if row.converged else " (not reached)"
        lines.append(
            f"{row.label:5d} {row.score:7.2f} {row.ratio:6.2f} {row.success_rate:8.3f} "
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


def _unlearn(args: argparse.Namespace) -> int:
    from defense_nc.unlearn import UnlearnConfig, unlearn
    from wm_victim import accuracy, attack_success, save_classifier

    model, data, known = _open(args)
    test = data.test.to(known.images.device)
    cleaned: nn.Module = model
    triggers = _triggers(args, model, known)
    config = UnlearnConfig.preset(args.recipe)
    for trigger in triggers.values():
        cleaned = unlearn(
            cleaned,
            trigger,
            known.images,
            known.labels,
            config=config,
            seed=args.seed,
            progress=True,
        )
    about = {"cleaned": sorted(triggers), "recipe": asdict(config), "seed": args.seed}
    save_classifier(cleaned.cpu(), args.out, {**about, "fingerprint": data.fingerprint})
    cleaned.to(known.images.device)
    print(f"accuracy {accuracy(model, test):.4f} -> {accuracy(cleaned, test):.4f}")
    for label, trigger in triggers.items():
        before, after = (
            attack_success(net, test, trigger, target=label) for net in (model, cleaned)
        )
        print(f"reversed trigger of label {label}: success {before:.4f} -> {after:.4f}")
    print(f"wrote {args.out}")
    return 0


def _triggers(args: argparse.Namespace, model: nn.Module, known: ImageSet) -> dict[int, nn.Module]:
    """The reversed triggers to unlearn: of the labels that a scan names, unless forced."""
    from defense_nc.inversion import invert_trigger
    from defense_nc.schedule import NCConfig

    if args.force:
        if args.label is None:
            raise ValueError("expected --label with --force")
        found = invert_trigger(
            model,
            known.images,
            args.label,
            labels=known.labels,
            config=NCConfig.preset(args.preset),
            seed=args.seed,
            progress=True,
        )
        return {args.label: found}
    report = _report(args, model, known)
    print(_table(report))
    wanted = report.suspected if args.label is None else (args.label,)
    if not wanted or not set(wanted) <= set(report.suspected):
        what = "no label" if args.label is None else f"not label {args.label}"
        raise ValueError(f"not cleaned: the scan named {what} (--force cleans --label regardless)")
    device = known.images.device
    return {label: report.triggers[label].to(device) for label in wanted}
