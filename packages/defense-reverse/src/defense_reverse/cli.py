"""The ``defense-reverse`` command: scan a classifier with reversed generators, and clean one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from defense_reverse.__about__ import __version__
from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli

if TYPE_CHECKING:
    from torch import nn

    from defense_nc import ScanReport
    from wm_victim.datasets import Dataset, ImageSet
    from wm_victim.models import Classifier

_EPILOG = """\
examples:
  defense-reverse scan victim.safetensors --data mnist --images 600 --preset fast --json scan.json
  defense-reverse clean victim.safetensors --data mnist --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
`clean` exits with 0 when it wrote a cleaned classifier, and with 1 when it did not.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `clean` 0, or 1 if not cleaned."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "clean":
        return _clean(args)
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
        prog="defense-reverse",
        description="Look for a backdoor with dynamic or invisible triggers in an image "
        "classifier: one reversed generator per label. Clean the label that a scan names.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"defense-reverse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scan = commands.add_parser("scan", help="is there a backdoor?", epilog=_EPILOG)
    _add_inputs(scan)
    scan.add_argument("--json", type=Path, help="also write the report here")
    scan.add_argument("--triggers", type=Path, help="also write the generators to this folder")
    add_common(scan, version=__version__)
    clean = commands.add_parser("clean", help="clean the label that a scan names", epilog=_EPILOG)
    _add_inputs(clean)
    clean.add_argument(
        "--clean-images", type=int, help="images to clean with (default: 5%% of the training set)"
    )
    clean.add_argument("--out", type=Path, required=True, help="the cleaned classifier's file")
    add_common(clean, version=__version__)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    parser.add_argument(
        "--data",
        required=True,
        help="clean images: digits, mnist, fashion-mnist, cifar10, gtsrb, a folder, or an .npz",
    )
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument(
        "--images", type=int, default=500, help="images to scan with (default: 500)"
    )
    parser.add_argument("--preset", choices=("paper", "robust", "fast"), default="robust")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="share of clean models that may be accused"
    )
    parser.add_argument(
        "--max-ratio", type=float, default=0.5, help="accuse only below this share of the median"
    )


def _open(args: argparse.Namespace) -> tuple[Classifier, Dataset]:
    from wm_victim.datasets import load_dataset
    from wm_victim.models import load_classifier

    model = load_classifier(args.classifier)
    data = load_dataset(args.data, root=args.root, image_size=model.config["image_size"])
    for name in ("num_classes", "channels"):
        if getattr(data, name) != model.config[name]:
            raise ValueError(
                f"expected data with {name} {model.config[name]}, as the classifier was trained "
                f"on, got {getattr(data, name)} in {data.name}"
            )
    return model.to(resolve_device(args.device)), data


def _report(args: argparse.Namespace, model: nn.Module, data: Dataset) -> ScanReport:
    from defense_reverse.scan import scan
    from defense_reverse.search import ReverseConfig
    from wm_victim.datasets import defender_subset

    known = defender_subset(data.train, count=args.images, seed=args.seed)
    report = scan(
        model,
        known.images,
        labels=known.labels,
        config=ReverseConfig.preset(args.preset),
        alpha=args.alpha,
        max_ratio=args.max_ratio,
        seed=args.seed,
    )
    print(_table(report))
    return report


def _scan(args: argparse.Namespace) -> ScanReport:
    from defense_reverse.trigger import ReversedTrigger, save_reversed
    from wm_inject.files import write_json

    model, data = _open(args)
    report = _report(args, model, data)
    about = {"classifier": args.classifier.name, "data": data.name, "preset": args.preset}
    about["fingerprint"] = data.fingerprint
    if args.json is not None:
        write_json(args.json, report.to_dict() | about)
    if args.triggers is not None:
        for label, trigger in report.triggers.items():
            assert isinstance(trigger, ReversedTrigger)
            save_reversed(trigger, args.triggers / f"label-{label}.safetensors", about)
    return report


def _table(report: ScanReport) -> str:
    lines = ["label  residual  ratio  success        p  paper index"]
    for row in report.labels:
        named = " <- suspected" if row.label in report.suspected else ""
        missed = "" if row.converged else " (not reached)"
        lines.append(
            f"{row.label:5d} {row.score:9.5f} {row.ratio:6.2f} {row.success_rate:8.3f} "
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


def _clean(args: argparse.Namespace) -> int:
    from defense_reverse.mitigate import mitigate
    from wm_victim.datasets import defender_subset
    from wm_victim.measure import accuracy, attack_success
    from wm_victim.models import save_classifier

    model, data = _open(args)
    report = _report(args, model, data)
    if not report.suspected:
        raise ValueError(f"not cleaned, the verdict is {report.verdict.value}: {report.reason}")
    device = next(model.parameters()).device
    count = args.clean_images or max(2, len(data.train) // 20)
    known: ImageSet = defender_subset(data.train, count=count, seed=args.seed)
    cleaned: nn.Module = model
    for label in report.suspected:
        trigger = report.triggers[label]
        cleaned = mitigate(
            cleaned, trigger, known.images, known.labels, seed=args.seed, progress=True
        )
    about = {"cleaned": list(report.suspected), "images": count, "seed": args.seed}
    save_classifier(cleaned.cpu(), args.out, {**about, "fingerprint": data.fingerprint})
    cleaned, test = cleaned.to(device), data.test.to(device)
    print(f"accuracy {accuracy(model, test):.4f} -> {accuracy(cleaned, test):.4f}")
    for label in report.suspected:
        trigger = report.triggers[label].to(device)
        rates = [attack_success(net, test, trigger, target=label) for net in (model, cleaned)]
        print(f"reversed generator of label {label}: success {rates[0]:.4f} -> {rates[1]:.4f}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
