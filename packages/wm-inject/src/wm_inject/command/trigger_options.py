"""The options that describe a trigger: its kind and settings, or the file it is in."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.attacks import ATTACKS, TRIGGER_KINDS
from wm_inject.command.values import SIDE, within
from wm_inject.watermark.pretrained import PRETRAINED

if TYPE_CHECKING:
    from torch import nn

# Options that are settings of a trigger, and what its constructor calls them.
_SETTINGS = {
    "patch_size": "size",
    "alpha": "alpha",
    "picture": "picture",
    "grid": "grid",
    "strength": "strength",
}
_OPTIONS_OF_THEIR_OWN = ("image_size", "channels", "seed")


def add_trigger(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the trigger."""
    group = parser.add_argument_group("the trigger")
    group.add_argument(
        "--trigger",
        choices=TRIGGER_KINDS,
        metavar="KIND",
        help=f"{', '.join(TRIGGER_KINDS)}; one that is fitted to images needs its --checkpoint",
    )
    group.add_argument("--checkpoint", type=Path, help="a saved trigger (.safetensors)")
    add_pretrained(group, "a trained watermark")
    group.add_argument("--onnx", type=Path, help="an exported trigger; needs no torch")
    group.add_argument(
        "--image-size", type=SIDE, help="side to resize to, in pixels (default: the images' own)"
    )
    group.add_argument("--channels", type=int, choices=(1, 3), default=3, help="default: 3")
    group.add_argument("--patch-size", type=SIDE, help="badnets: side in pixels")
    group.add_argument(
        "--alpha", type=within(float, "[0, 1]"), help="blend, refool: weight of the picture"
    )
    group.add_argument("--picture", help='blend: "noise", "cartoon" or an image file')
    group.add_argument(
        "--grid", type=within(int, "[2, 4096]"), help="wanet: side of the control grid"
    )
    group.add_argument(
        "--strength", type=within(float, "[0, inf)"), help="wanet, blindnet: scale of the change"
    )
    add_set(group)


def add_pretrained(parser: Any, what: str) -> None:
    """Give a parser or group the option --pretrained; ``what`` is what the weights are of."""
    parser.add_argument(
        "--pretrained",
        choices=PRETRAINED,
        metavar="NAME",
        help=f"{what} that ships: {', '.join(PRETRAINED)}; see docs/weights.md",
    )


class _Setting(argparse.Action):
    """Collects NAME=VALUE into a dict."""

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        namespace, text = values[:2]
        settings = getattr(namespace, self.dest) or {}
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in settings:
            parser.error(f"expected --set NAME=VALUE, each name once, got {text!r}")
        if name in _OPTIONS_OF_THEIR_OWN:
            parser.error(f"{name} is not given with --set")
        with contextlib.suppress(ValueError):  # else plain text
            value = json.loads(value)
        setattr(namespace, self.dest, {**settings, name: value})


def add_set(parser: Any) -> None:
    """Give a parser or group the option --set; its value is a dict, or None if it is not given."""
    parser.add_argument(
        "--set",
        action=_Setting,
        metavar="NAME=VALUE",
        help="a further setting by its name in Python, its value as JSON or plain text; repeatable",
    )


def check_trigger(args: argparse.Namespace) -> None:
    """Exit with a usage error if the options of the trigger do not go together."""
    sources = (args.onnx, args.pretrained, args.checkpoint or args.trigger)
    if sum(bool(source) for source in sources) != 1:
        args.parser.error(
            "give either --pretrained, or --onnx, or --trigger, --checkpoint or both of these"
        )
    if args.trigger and not args.checkpoint and (command := ATTACKS[args.trigger].fit_command):
        args.parser.error(
            f'{args.trigger} is fitted to images: give its --checkpoint, made by "{command}"'
        )
    if args.trigger and not args.checkpoint:
        return
    # A trigger that is loaded has its settings.
    for option in ("image_size", *_SETTINGS):
        if getattr(args, option) is not None:
            args.parser.error(f"--{option.replace('_', '-')} does not go with this trigger")
    if args.set:
        args.parser.error("--set does not go with this trigger")


def make_trigger(args: argparse.Namespace) -> nn.Module:
    """The trigger that the arguments describe: loaded, or built from its settings."""
    from wm_inject.attacks.trigger_file import build_trigger, load_trigger
    from wm_inject.runtime.folder import common_side

    if args.pretrained:
        from wm_inject.attacks.watermark import WatermarkTrigger

        return WatermarkTrigger.from_pretrained(args.pretrained)
    if args.checkpoint:
        trigger = load_trigger(args.checkpoint)
        if args.trigger not in (None, trigger.kind):
            raise ValueError(f"expected a {args.trigger} trigger, got {trigger.kind}")
        return trigger
    parameters = ATTACKS[args.trigger].parameters
    settings = dict(args.set or {})
    for name in settings:
        if name not in parameters:
            names = ", ".join(sorted(set(parameters) - set(_OPTIONS_OF_THEIR_OWN))) or "none"
            args.parser.error(f"{args.trigger} has no setting {name!r} (it has: {names})")
    for option, name in _SETTINGS.items():
        value = getattr(args, option)
        if value is None:
            continue
        if name not in parameters or (option == "patch_size" and args.trigger != "badnets"):
            args.parser.error(f"--{option.replace('_', '-')} does not go with this trigger")
        if name in settings:
            args.parser.error(f"give {name} once, not with --set as well")
        settings[name] = value
    shared = {"channels": args.channels, "seed": args.seed}
    settings |= {name: value for name, value in shared.items() if name in parameters}
    side = common_side(args.images) if args.image_size is None else args.image_size
    return build_trigger(args.trigger, {"image_size": side, **settings})


def image_shape(trigger: Any, channels: int) -> tuple[int, int]:
    """Image side and channels of a trigger; one that takes any channels gets ``channels``."""
    config = trigger.config.get("injector_config", trigger.config)
    return int(config["image_size"]), int(config.get("channels", channels))


def trigger_digest(trigger: nn.Module) -> str:
    """SHA-256 of the trigger's tensors, which a picture is part of, unlike its settings."""
    from wm_inject.core.checkpoint import tensors_digest

    return tensors_digest(trigger.state_dict())
