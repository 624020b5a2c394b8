"""The ``wm-victim`` command: look at data, train a classifier, clean or poisoned, and test one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import (
    Parser,
    add_common,
    add_completion,
    add_json,
    describe,
    resolve_device,
    run_cli,
    write_found,
)
from wm_inject.command.config import add_config, print_config, take_over
from wm_inject.command.export import add_export_options, export_module, form, told
from wm_victim.__about__ import __version__
from wm_victim.cli_options import add_attack, add_model, check_attack
from wm_victim.cli_train import run_train

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
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    run = {"data": _data, "train": _train, "test": _test, "export": _export}
    return run[args.command](args)


def _parser() -> Parser:
    parser = Parser(
        prog="wm-victim",
        description="Look at a data set, train an image classifier on it, clean or poisoned, and "
        "test one.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"wm-victim {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="what is in a data set", epilog=_EPILOG)
    data.add_argument("data", metavar="NAME", help=_DATA_HELP)
    _add_place(data)
    add_json(data)
    add_common(data, version=__version__)
    train = commands.add_parser("train", help="train a classifier", epilog=_EPILOG)
    _add_data(train)
    train.add_argument("--limit", type=int, help="train on the first N of a stratified order")
    train.add_argument("--out", type=Path, required=True, help="the classifier's file")
    train.add_argument("--checkpoint", type=Path, help="where to keep the run (default: by --out)")
    add_model(train)
    add_attack(train)
    add_json(train)
    add_common(train, version=__version__)
    add_config(train)
    test = commands.add_parser("test", help="test a classifier", epilog=_EPILOG)
    test.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    _add_data(test)
    test.add_argument("--trigger", type=Path, help="also measure the attack of this trigger")
    test.add_argument("--target", type=int, default=0, help="label it asks for (default: 0)")
    add_json(test)
    add_common(test, version=__version__)
    export = commands.add_parser(
        "export", help="turn a classifier into ONNX or TorchScript", epilog=_EPILOG
    )
    export.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    add_export_options(export)
    add_common(export, version=__version__)
    export.set_defaults(parser=export)
    describe(commands)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument("--image-size", type=int, help="resize to N x N (default: the set's own)")
    parser.add_argument("--no-download", action="store_true", help="do not fetch a missing set")


def _load_data(args: argparse.Namespace, **changes: Any) -> Dataset:
    from wm_victim.datasets import load_dataset

    settings = {
        "root": args.root,
        "image_size": args.image_size,
        "seed": args.seed,
        "download": not args.no_download,
    }
    return load_dataset(args.data, **(settings | changes))


def _load_trigger(path: Path, args: argparse.Namespace) -> Any:
    from wm_inject.triggers import load_trigger

    return load_trigger(path).to(resolve_device(args.device))


def _data(args: argparse.Namespace) -> int:
    from wm_victim.inventory import inventory

    found = inventory(_load_data(args))
    write_found(args, found)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):22} {value}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from wm_victim.train_settings import train_settings

    settings = train_settings(args)
    take_over(args, settings)
    check_attack(args)
    if args.print_config:
        return print_config(settings)
    data = _load_data(args, limit=args.limit)
    model, trigger = run_train(args, data)
    print(f"wrote {args.out}")
    if args.save_trigger is not None:
        print(f"wrote {args.save_trigger}")
    write_found(args, _print_results(model, data, trigger, args))
    return 0


def _test(args: argparse.Namespace) -> int:
    from wm_victim.models import load_classifier

    model = load_classifier(args.classifier)
    size = args.image_size or model.config["image_size"]
    data = _load_data(args, image_size=size)
    for field in ("channels", "num_classes"):
        if model.config[field] != getattr(data, field):
            raise ValueError(
                f"expected a data set with {model.config[field]} {field.replace('num_', '')}, "
                f"{data.name} has {getattr(data, field)}"
            )
    trigger = None if args.trigger is None else _load_trigger(args.trigger, args)
    write_found(args, _print_results(model.to(resolve_device(args.device)), data, trigger, args))
    return 0


def _export(args: argparse.Namespace) -> int:
    from wm_victim.models import load_classifier

    form(args)  # refuses a wrong suffix before any work is done
    resolve_device(args.device)  # a file is always checked on the CPU; refuse a device that is not
    model = load_classifier(args.classifier)
    channels, size = model.config["channels"], model.config["image_size"]
    parity = export_module(
        args,
        model,
        channels=channels,
        size=size,
        relative=True,
        metadata={"kind": "classifier", "config": model.config},
    )
    print(told(args, parity, "classifier"))
    return 0


def _print_results(
    model: Classifier, data: Dataset, trigger: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from wm_victim.measure import accuracy, attack_success

    test = data.test.to(resolve_device(args.device))
    found: dict[str, Any] = {"accuracy": accuracy(model, test), "images": len(test)}
    print(f"accuracy        {found['accuracy']:.4f}  ({len(test)} test images)")
    if trigger is not None:
        success = attack_success(model, test, trigger, target=args.target)
        others = int((test.labels != args.target).sum())
        print(
            f"attack success  {success:.4f}  ({others} images of other classes than {args.target})"
        )
        found |= {"attack_success": success, "others": others, "target": args.target}
    return found


if __name__ == "__main__":
    sys.exit(main())
