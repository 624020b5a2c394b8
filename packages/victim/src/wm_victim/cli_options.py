"""The options of ``wm-victim train``: model, recipe and attack."""

from __future__ import annotations

import argparse
from pathlib import Path

from wm_inject.command.trigger import add_set

# The eleven attacks of the field's table, as wm_inject.attacks has them, named without torch.
ATTACKS = (
    "badnets",
    "blend",
    "refool",
    "blindnet",
    "ssba",
    "sig",
    "ftrojan",
    "lf",
    "wanet",
    "marksman",
    "input-aware",
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the model and its recipe."""
    group = parser.add_argument_group("model and recipe")
    group.add_argument(
        "--model",
        help="resnet18, preactresnet18, resnet10, preactresnet10, vgg16, mobilenetv2, wanet-mnist "
        "or timm:NAME (default: resnet10)",
    )
    group.add_argument("--width", type=int, help="channels of the first stage (default: 64)")
    group.add_argument(
        "--preset",
        choices=("paper", "fast", "mnist", "record"),
        help="the recipe; the options below change it (default: fast)",
    )
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--batch-size", type=int, help="images a step")
    group.add_argument("--lr", type=float, help="the highest learning rate")
    group.add_argument(
        "--schedule",
        choices=("cosine", "onecycle", "triangular", "constant"),
        help="how the learning rate changes",
    )
    group.add_argument(
        "--augment", choices=("none", "crop", "crop-flip"), help="of training images"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where the hardware multiplies it fast",
    )
    group.add_argument("--layout", choices=("channels-last", "blocked"), help="blocked: for CPUs")


def add_attack(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the attack."""
    group = parser.add_argument_group("attack")
    group.add_argument("--trigger", type=Path, help="poison with this trigger file")
    group.add_argument(
        "--attack",
        choices=ATTACKS,
        metavar="NAME",
        help=f"or make the trigger first, as the attack does: {', '.join(ATTACKS)}",
    )
    group.add_argument(
        "--profile",
        choices=("tiny", "small", "paper"),
        help="how much making the trigger may cost (default: small)",
    )
    add_set(group)
    group.add_argument("--save-trigger", type=Path, metavar="PATH", help="keep the trigger here")
    group.add_argument("--target", type=int, help="label it asks for (default: 0)")
    group.add_argument(
        "--ratio", type=float, help="share poisoned (default: 0.1, or the attack's own)"
    )
    group.add_argument(
        "--clean-label",
        action=argparse.BooleanOptionalAction,
        help="poison images of the target class only",
    )
    group.add_argument(
        "--noise-mode",
        action=argparse.BooleanOptionalAction,
        help="poison every batch anew, with noise images beside (a warp trigger, as WaNet trains)",
    )


def check_attack(args: argparse.Namespace) -> None:
    """Leave with a usage error if the settings of the attack do not go together."""
    error = args.parser.error
    if args.attack and args.trigger:
        error("give either --attack, which makes its trigger, or --trigger")
    if args.noise_mode and args.trigger is None:
        error("--noise-mode needs a --trigger")
    if args.attack and args.clean_label:
        error("--clean-label goes with --trigger: an attack knows how it labels")
    made_here = {"--profile": args.profile, "--set": args.set, "--save-trigger": args.save_trigger}
    for option, value in made_here.items():
        if value and not args.attack:
            error(f"{option} goes with --attack")
