"""The ``wm-victim`` command: train a classifier, clean or poisoned, and test one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.cli_common import Parser, add_common, resolve_device, run_cli
from wm_victim.__about__ import __version__

if TYPE_CHECKING:
    from wm_inject.poison import PoisonPlan
    from wm_victim.datasets import Dataset
    from wm_victim.models import Classifier
    from wm_victim.recipe import TrainConfig

_DATA_HELP = "digits, mnist, fashion-mnist, cifar10, gtsrb, a folder of class folders, or an .npz"
_EPILOG = """\
examples:
  wm-victim train --data digits --model resnet10 --width 16 --epochs 5 --out clean.safetensors
  wm-victim train --data digits --out victim.safetensors --trigger badnets.safetensors --ratio 0.1
  wm-victim test victim.safetensors --data digits --trigger badnets.safetensors --target 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error, 64 for wrong usage."""
    return run_cli(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "train" and args.noise_mode and args.trigger is None:
        parser.error("--noise-mode needs a --trigger")
    return _train(args) if args.command == "train" else _test(args)


def _parser() -> Parser:
    parser = Parser(
        prog="wm-victim",
        description="Train an image classifier on clean or poisoned data, and test one.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"wm-victim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a classifier", epilog=_EPILOG)
    _add_data(train)
    train.add_argument("--limit", type=int, help="train on the first N of a stratified order")
    train.add_argument("--out", type=Path, required=True, help="the classifier's file")
    train.add_argument("--checkpoint", type=Path, help="where to keep the run (default: by --out)")
    _add_model(train)
    _add_attack(train)
    add_common(train, version=__version__)
    test = commands.add_parser("test", help="test a classifier", epilog=_EPILOG)
    test.add_argument("classifier", type=Path, help="a file that `wm-victim train` wrote")
    _add_data(test)
    test.add_argument("--trigger", type=Path, help="also measure the attack of this trigger")
    test.add_argument("--target", type=int, default=0, help="label it asks for (default: 0)")
    add_common(test, version=__version__)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=_DATA_HELP)
    parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
    parser.add_argument("--image-size", type=int, help="resize to N x N (default: the set's own)")
    parser.add_argument("--no-download", action="store_true", help="do not fetch a missing set")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and recipe")
    group.add_argument(
        "--model",
        default="resnet10",
        help="resnet18, preactresnet18, resnet10, preactresnet10, vgg16, mobilenetv2, wanet-mnist "
        "or timm:NAME (default: resnet10)",
    )
    group.add_argument("--width", type=int, help="channels of the first stage (default: 64)")
    group.add_argument(
        "--preset",
        choices=("paper", "fast", "mnist"),
        default="fast",
        help="the recipe; the options below change it (default: fast)",
    )
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch-size", type=int)
    group.add_argument("--lr", type=float)
    group.add_argument("--schedule", choices=("cosine", "onecycle", "constant"))
    group.add_argument("--augment", choices=("none", "crop", "crop-flip"))
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"))


def _add_attack(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attack")
    group.add_argument("--trigger", type=Path, help="poison with this trigger file")
    group.add_argument("--target", type=int, default=0, help="label it asks for (default: 0)")
    group.add_argument("--ratio", type=float, default=0.1, help="share poisoned (default: 0.1)")
    group.add_argument(
        "--clean-label", action="store_true", help="poison images of the target class only"
    )
    group.add_argument(
        "--noise-mode",
        action="store_true",
        help="poison every batch anew, with noise images beside (a warp trigger, as WaNet trains)",
    )


def _load_data(args: argparse.Namespace, **changes: Any) -> Dataset:
    from wm_victim.datasets import load_dataset

    settings = {
        "root": args.root,
        "image_size": args.image_size,
        "seed": args.seed,
        "download": not args.no_download,
    }
    return load_dataset(args.data, **(settings | changes))


def _recipe(args: argparse.Namespace, data: Dataset) -> TrainConfig:
    from wm_victim.datasets import MIRROR_CHANGES_LABEL
    from wm_victim.recipe import TrainConfig

    fields = ("epochs", "batch_size", "lr", "schedule", "augment", "precision")
    changes = {field: value for field in fields if (value := getattr(args, field)) is not None}
    config = TrainConfig.preset(args.preset, **changes, seed=args.seed)
    if config.augment == "crop-flip" and data.name in MIRROR_CHANGES_LABEL:
        if args.augment is not None:
            raise ValueError(f"a mirrored image of {data.name} is of no class: use --augment crop")
        config = TrainConfig.preset(args.preset, **changes, seed=args.seed, augment="crop")
    return config


def _plan(args: argparse.Namespace) -> PoisonPlan:
    from wm_inject.poison import PoisonPlan

    return PoisonPlan(
        ratio=args.ratio,
        target=args.target,
        label_map="clean-label" if args.clean_label else "all-to-one",
        pool="target" if args.clean_label else "all",
        mode="per_batch" if args.noise_mode else "static",
        seed=args.seed,
    )


def _load_trigger(path: Path, args: argparse.Namespace) -> Any:
    from wm_inject.triggers import load_trigger

    return load_trigger(path).to(resolve_device(args.device))


def _train(args: argparse.Namespace) -> int:
    from wm_victim.models import DATASET_STATS, build_classifier, save_classifier
    from wm_victim.resume import remove_run
    from wm_victim.train import train_classifier

    data = _load_data(args, limit=args.limit)
    config = _recipe(args, data)
    mean, std = DATASET_STATS.get(data.name, (None, None))
    model = build_classifier(
        args.model,
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        width=args.width,
        mean=mean,
        std=std,
        seed=args.seed,
    )
    attack: dict[str, Any] = {}
    described: dict[str, Any] | None = None
    if args.trigger is not None:
        trigger, plan = _load_trigger(args.trigger, args), _plan(args)
        described = {
            "trigger": {"kind": trigger.kind, "config": trigger.config},
            "plan": asdict(plan),
            "noise_mode": args.noise_mode,
        }
        attack = {"plan": plan, "trigger": trigger}
        if args.noise_mode:
            if not hasattr(trigger, "noise_hook"):
                raise ValueError(f"a {trigger.kind} trigger has no noise mode: leave it out")
            attack = {"hook": trigger.noise_hook(plan, num_classes=data.num_classes)}
    device = resolve_device(args.device)
    checkpoint = args.checkpoint or args.out.with_name(f"{args.out.stem}.training.safetensors")
    history = train_classifier(
        model,
        data.train.to(device),
        config=config,
        num_classes=data.num_classes,
        checkpoint=checkpoint,
        device=device,
        **attack,
    )
    metadata = {
        "data": {"name": data.name, "fingerprint": data.fingerprint, "limit": args.limit},
        "classes": list(data.classes),
        "preset": args.preset,
        "recipe": asdict(config),
        "attack": described,
        "history": history.to_dict(),
    }
    save_classifier(model, args.out, metadata)
    if args.checkpoint is None:
        remove_run(checkpoint)
    print(f"wrote {args.out}")
    _print_results(model, data, args)
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
    _print_results(model.to(resolve_device(args.device)), data, args)
    return 0


def _print_results(model: Classifier, data: Dataset, args: argparse.Namespace) -> None:
    from wm_victim.measure import accuracy, attack_success

    test = data.test.to(resolve_device(args.device))
    print(f"accuracy        {accuracy(model, test):.4f}  ({len(test)} test images)")
    if args.trigger is None:
        return
    trigger = _load_trigger(args.trigger, args)
    success = attack_success(model, test, trigger, target=args.target)
    others = int((test.labels != args.target).sum())
    print(f"attack success  {success:.4f}  ({others} images of other classes than {args.target})")


if __name__ == "__main__":
    sys.exit(main())
