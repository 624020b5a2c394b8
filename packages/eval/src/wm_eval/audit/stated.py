"""What the user or the file says of a model's images and labels; the rest is found out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.command.common import Parser

if TYPE_CHECKING:
    from wm_eval.audit.checks import Stated
    from wm_victim.loading import OpenedModel
    from wm_victim.reading import Way

# Names of wm_victim.preprocessing, which imports torch.
PREPROCESSING = ("unit", "255", "signed", "imagenet", "cifar10", "mnist", "caffe")


def add_reading_options(parser: Parser) -> None:
    """Give a command the options that say how a model's images and labels are meant."""
    group = parser.add_argument_group("images and labels (what is left out is found out)")
    group.add_argument(
        "--preprocessing",
        choices=PREPROCESSING,
        help="what the model expects of its images: values in 0 .. 1, 0 .. 255 or -1 .. 1, a data "
        "set's normalisation, or 0 .. 255 less Caffe's mean",
    )
    group.add_argument("--channel-order", choices=("rgb", "bgr"), help="of the model's images")
    group.add_argument(
        "--class-names",
        metavar="FILE|A,B,C",
        help="names of its classes in the order of its outputs: a list, a file with one a line, "
        "or JSON",
    )
    group.add_argument(
        "--label-offset", type=int, metavar="N", help="the labels count the first output as N"
    )
    group.add_argument(
        "--unlabelled", action="store_true", help="the folders and tables are no classes"
    )


def read_stated(args: argparse.Namespace, opened: OpenedModel) -> Stated:
    """What the options and the opened file say.

    Raises:
        ValueError: Not as many names as outputs, an unreadable file of names, or options that
            exclude each other.
    """
    from wm_eval.audit.checks import Stated

    names = None if args.class_names is None else read_names(args.class_names)
    if names is not None and len(names) != opened.num_classes:
        raise ValueError(
            f"expected {opened.num_classes} class names, one an output, got {len(names)}"
        )
    return Stated(
        class_names=opened.class_names if names is None else names,
        by_user=names is not None,
        label_offset=args.label_offset,
        ways=_ways(args, opened),
    )


def read_names(text: str) -> tuple[str, ...]:
    """Names of classes from a list with commas, or a file: one a line, or JSON.

    Raises:
        ValueError: A file that is neither, or JSON of another form.
    """
    path = Path(text)
    if "," in text and not path.is_file():
        return tuple(name.strip() for name in text.split(","))
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return tuple(line.strip() for line in content.splitlines() if line.strip())
        return _from_json(json.loads(content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected names a,b,c or a file with one name a line or JSON as --class-names, got "
            f"{path.name}: {error}"
        ) from error


def _from_json(content: Any) -> tuple[str, ...]:
    """A list of names, or an object with names by output or outputs by name."""
    if isinstance(content, dict) and all(isinstance(n, int) for n in content.values()):
        content = {number: name for name, number in content.items()}  # as torchvision has it
    if isinstance(content, dict):
        content = {int(number): name for number, name in content.items()}
        content = [content[number] for number in range(len(content))]
    # ImageNet's index has pairs of an identifier and a name.
    return tuple(str(name[-1] if isinstance(name, list) else name) for name in content)


def _ways(args: argparse.Namespace, opened: OpenedModel) -> tuple[Way, ...]:
    from wm_victim.preprocessing import own_normalize
    from wm_victim.reading import Way, all_ways

    name, order = args.preprocessing, args.channel_order
    if opened.source == "wm" and name is None and order is None:
        return (Way(),)  # our own files bring their normalisation
    if args.mean is not None and name is not None:
        raise ValueError("expected --preprocessing or --mean and --std, got both")
    if name == "unit" and own_normalize(opened.module) is None:
        name = None
    fixed = args.preprocessing is not None or args.mean is not None
    ways = tuple(
        way
        for way in all_ways(opened.module, opened.channels)
        if order in (None, way.channel_order) and (not fixed or way.preprocessing == name)
    )
    if not ways:
        raise ValueError("expected --channel-order rgb for a model of one channel")
    return ways
