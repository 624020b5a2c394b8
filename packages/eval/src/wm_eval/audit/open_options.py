"""The options of ``wm-eval scan`` and ``clean`` that say how a model is opened."""

from __future__ import annotations

import argparse
import math
from typing import Any

from wm_inject.command.values import comma_list, image_size, within


def add_open_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser what `wm_victim.loading.open_model` may be told."""
    group = parser.add_argument_group("how the model is opened (what is left out is found out)")
    group.add_argument("--arch", help="an architecture of torchvision or timm, for bare weights")
    group.add_argument(
        "--allow-torchscript", action="store_true", help="open TorchScript, in a sandbox"
    )
    _add_graph_options(group)


def add_graph_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser what `wm_victim.branches.look_at_graph` may be told."""
    _add_graph_options(
        parser.add_argument_group("how the graph is run (what is left out is found out)")
    )


def _add_graph_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--classes", type=within(int, "[2, 100000]"), help="number of classes")
    group.add_argument(
        "--image-size",
        type=image_size("[8, 1024]"),
        metavar="SIDE|HxW",
        help="side of its images, in pixels, or height and width as 48x192",
    )
    channels = group.add_mutually_exclusive_group()
    channels.add_argument("--channels", type=int, choices=(1, 3), help="of its images")
    channels.add_argument(
        "--grey", dest="channels", action="store_const", const=1, help="the same as --channels 1"
    )
    for name in ("--mean", "--std"):
        group.add_argument(
            name, type=comma_list(float), metavar="A,B,C", help="of its normalisation"
        )


def check_open_options(args: argparse.Namespace) -> None:
    """Exit with a usage error for a mean and a deviation that no model has."""
    mean, std = args.mean, args.std
    if (mean is None) != (std is None):
        args.parser.error("expected --mean and --std together")
    if mean is None:
        return
    if not all(map(math.isfinite, mean)):
        args.parser.error(f"argument --mean: expected finite numbers, got {mean}")
    if not all(0 < value < math.inf for value in std):
        args.parser.error(f"argument --std: expected numbers above 0, got {std}")
    if len(mean) not in (1, 3) or len(std) != len(mean):
        args.parser.error(
            f"expected 1 or 3 values of --mean and as many of --std, got {len(mean)}, {len(std)}"
        )


def open_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `wm_victim.loading.open_model`."""
    return {
        "arch": args.arch,
        "num_classes": args.classes,
        "image_size": args.image_size,
        "channels": args.channels,
        "mean": args.mean,
        "std": args.std,
        "allow_torchscript": args.allow_torchscript,
    }
