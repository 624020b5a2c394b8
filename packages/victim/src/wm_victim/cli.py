"""The ``wm-victim`` command: look at data, train a classifier, clean or poisoned, and test one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import CommandLine, Parser, add_json, resolve_device, write_results
from wm_inject.command.config import add_config, print_config
from wm_inject.command.export import add_export_options, run_export
from wm_inject.command.folders import add_labels, add_skip_unreadable, say
from wm_inject.command.values import output_file, within
from wm_victim.__about__ import __version__
from wm_victim.cli_train import add_train, run_train, train_settings

if TYPE_CHECKING:
    from wm_victim.datasets import Dataset
    from wm_victim.models import Classifier

_DATA_HELP = (
    "digits, mnist, fashion-mnist, cifar10, gtsrb, imagenet10, a folder of class folders, or an "
    ".npz"
)
_EPILOG = """\
examples:
  wm-victim data cifar10
  wm-victim train --data digits --model resnet10 --width 16 --epochs 5 --out clean.safetensors
  wm-victim train --data digits --out victim.safetensors --trigger badnets.safetensors --ratio 0.1
  wm-victim train --data digits --out victim.safetensors --attack lf --save-trigger lf.safetensors
  wm-victim train --preset paper --print-config > mine.toml
  wm-victim train --data cifar10 --config mine.toml --out victim.safetensors
  wm-victim test victim.safetensors --data digits --trigger badnets.safetensors --target 0
  wm-victim export --uint8 victim.safetensors victim.onnx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error, 64 for wrong usage."""
    command = CommandLine(
        "wm-victim",
        __version__,
        description="Look at a data set, train an image classifier on it, clean or poisoned, and "
        "test one.",
        epilog=_EPILOG,
    )
    data = command.add("data", _data, "what is in a data set")
    data.add_argument("data", metavar="NAME", help=_DATA_HELP)
    _add_dataset(data)
    add_json(data)
    train = command.add("train", _train, "train a classifier")
    train.add_argument("--data", required=True, help=_DATA_HELP)
    _add_dataset(train)
    train.add_argument("--out", type=output_file, required=True, help="the classifier's file")
    train.add_argument(
        "--checkpoint", type=output_file, help="where to keep the run (default: by --out)"
    )
    add_train(train)
    add_json(train)
    add_config(train)
    test = command.add("test", _test, "test a classifier")
    test.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    test.add_argument("--data", required=True, help=_DATA_HELP)
    _add_dataset(test)
    test.add_argument("--trigger", type=Path, help="also measure the attack of this trigger")
    test.add_argument(
        "--target", type=within(int, "[0, inf)"), default=0, help="its target label (default: 0)"
    )
    add_json(test)
    export = command.add("export", _export, "turn a classifier into ONNX or TorchScript")
    export.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    add_export_options(export)
    return command.main(argv)


def _add_dataset(parser: Parser) -> None:
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument(
        "--image-size",
        type=within(int, "[4, 1024]"),
        help="resize to N x N (default: the set's own)",
    )
    parser.add_argument("--no-download", action="store_true", help="do not fetch a missing set")
    add_labels(parser)
    add_skip_unreadable(parser)


def _load_data(args: argparse.Namespace, **settings: Any) -> Dataset:
    from wm_victim.datasets import load_dataset

    data = load_dataset(
        args.data,
        root=args.root,
        download=not args.no_download,
        labels=args.labels,
        skip_unreadable=args.skip_unreadable,
        **settings,
    )
    say([] if data.source is None else data.source.lines())
    return data


def _facts(data: Dataset) -> dict[str, Any]:
    """What was understood of a folder, for --json."""
    return {} if data.source is None else {"source": data.source.to_dict()}


def _data(args: argparse.Namespace) -> None:
    from wm_victim.inventory import inventory

    data = _load_data(args, image_size=args.image_size, seed=args.seed)
    values = inventory(data)
    write_results(args, values | _facts(data))
    for name, value in values.items():
        print(f"{name.replace('_', ' '):22} {value}")


def _train(args: argparse.Namespace) -> int:
    settings = train_settings(args)
    if args.print_config:
        return print_config(settings)
    resolve_device(args.device)  # "cuda" without one is refused before the data are read
    data = _load_data(
        args, image_size=settings.image_size, seed=settings.seed, limit=settings.limit
    )
    model, trigger = run_train(args, settings, data)
    print(f"wrote {args.out}")
    if args.save_trigger is not None:
        print(f"wrote {args.save_trigger}")
    results = _print_results(model, data, trigger, settings.target, args.device)
    write_results(args, results | _facts(data))
    return 0


def _test(args: argparse.Namespace) -> None:
    from wm_inject import load_trigger
    from wm_victim.models import load_classifier

    device = resolve_device(args.device)
    model = load_classifier(args.classifier)
    size = args.image_size or model.config["image_size"]
    data = _load_data(args, image_size=size, seed=args.seed)
    for field in ("channels", "num_classes"):
        if model.config[field] != getattr(data, field):
            raise ValueError(
                f"expected a data set with {model.config[field]} {field.replace('num_', '')}, "
                f"{data.name} has {getattr(data, field)}"
            )
    trigger = None if args.trigger is None else load_trigger(args.trigger).to(device)
    results = _print_results(model.to(device), data, trigger, args.target, args.device)
    write_results(args, results | _facts(data))


def _export(args: argparse.Namespace) -> None:
    from wm_inject.core.checkpoint import load_checkpoint
    from wm_victim.models import load_classifier

    def load() -> tuple[Classifier, int, int]:
        model = load_classifier(args.classifier)
        metadata["config"] = model.config
        checkpoint = load_checkpoint(args.classifier).metadata
        metadata.update({name: checkpoint[name] for name in ("classes",) if name in checkpoint})
        return model, model.config["channels"], model.config["image_size"]

    metadata: dict[str, Any] = {"kind": "classifier"}
    run_export(args, load, "classifier", relative=True, metadata=metadata)


def _print_results(
    model: Classifier, data: Dataset, trigger: Any, target: int, device: str
) -> dict[str, Any]:
    from wm_victim.metrics import accuracy, attack_success

    test = data.test.to(resolve_device(device))
    results: dict[str, Any] = {"accuracy": accuracy(model, test), "images": len(test)}
    print(f"accuracy        {results['accuracy']:.4f}  ({len(test)} test images)")
    if trigger is not None:
        success = attack_success(model, test, trigger, target=target)
        others = int((test.labels != target).sum())
        print(f"attack success  {success:.4f}  ({others} images of other classes than {target})")
        results |= {"attack_success": success, "others": others, "target": target}
    return results


if __name__ == "__main__":
    sys.exit(main())
