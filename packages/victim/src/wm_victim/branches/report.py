"""What a look at a graph found, read from the child's words without trusting them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from wm_inject.core.image_size import ImageSize, height_width, size_from_json
from wm_inject.core.text import printable
from wm_victim.branches.effect import Effect
from wm_victim.loading.contract import LoadingError
from wm_victim.loading.onnx_module import LEAST_SIDE, MOST_SIDE

if TYPE_CHECKING:
    from wm_inject.core.images import Pixels

State = Literal["steers", "fired", "preparation", "harmless", "not fired"]
_LISTS = ("operators", "decides", "reads", "joins", "values", "sides")
_NUMBERS = ("layers", "all_layers", "clean", "clean_taken")
_MOST = 200


@dataclass(frozen=True, eq=False)
class Branch:
    """A way around the trained layers on which the picture can steer the answer.

    Args:
        state: "steers": a small change of pictures fires it, and then it decides the answer;
            "fired": it fires and changes answers, but only where most of a picture is replaced, or
            for a minority; "preparation": the same, before the first layer; "harmless": it fires,
            and no answer changes; "not fired": nothing that was tried fires it.
        operators: Its nodes in order, each as its operator and name.
        decides: Those of them that compare, choose or saturate.
        reads: What it begins with: the pixels, or a node and how many layers lie before that.
        joins: The nodes where it meets what the layers gave.
        values: The names of the values that it hands over there.
        sides: What the sides of its Ifs lead to.
        output: The output that it reaches.
        layers: Trained layers on its way, of ``all_layers``.
        clean: Clean pictures that were looked at.
        clean_taken: How many of them take it.
        stamp: The change that fires it, in words; "" if none does.
        share: The share of pixels that it changes.
        change: The most by which it changes a pixel.
        box: First and last row, first and last column that it changes; () for none.
        effect: What that does to clean pictures; None if nothing fires it.
        picture: A clean picture with the change, uint8 ``(H, W, C)``; None as well.
        why: Why it could not be searched for, if it could not.
    """

    state: State
    operators: tuple[str, ...]
    decides: tuple[str, ...]
    reads: tuple[str, ...]
    joins: tuple[str, ...]
    values: tuple[str, ...]
    sides: tuple[str, ...]
    output: str
    layers: int
    all_layers: int
    clean: int
    clean_taken: int
    stamp: str = ""
    share: float = 0.0
    change: float = 0.0
    box: tuple[int, ...] = ()
    effect: Effect | None = None
    picture: Pixels | None = None
    why: str = ""


@dataclass(frozen=True, eq=False)
class GraphReport:
    """The branches of an ONNX graph.

    Args:
        branches: Those that steer first.
        sha256: Of the file.
        notes: How the graph was understood.
        layers: Trained layers.
        nodes: Nodes that the answer depends on.
        images: Clean pictures that were looked at.
        own_images: Whether they were the caller's.
        image_size: H = W in pixels, or (H, W) where the two differ.
        channels: 1 or 3.
    """

    branches: tuple[Branch, ...]
    sha256: str
    notes: tuple[str, ...]
    layers: int
    nodes: int
    images: int
    own_images: bool
    image_size: ImageSize
    channels: int

    @property
    def steering(self) -> tuple[Branch, ...]:
        """The branches that were shown to fire and to decide the answer."""
        return tuple(branch for branch in self.branches if branch.state == "steers")

    @property
    def unclear(self) -> tuple[Branch, ...]:
        """Branches that could not be fired, or only by pictures that are replaced."""
        return tuple(one for one in self.branches if one.state in ("fired", "not fired"))


def read_report(found: dict[str, Any], *, sha256: str, own_images: bool) -> GraphReport:
    """The report of a child, checked.

    Raises:
        LoadingError: It is none.
    """
    try:
        size = size_from_json(found["image_size"], least=LEAST_SIDE, most=MOST_SIDE)
        channels = _number(found["channels"])
        branches = [_branch(each, size, channels) for each in found["branches"][:_MOST]]
        order = get_args(State)
        return GraphReport(
            branches=tuple(sorted(branches, key=lambda branch: order.index(branch.state))),
            sha256=sha256,
            notes=_texts(found["notes"]),
            layers=_number(found["layers"]),
            nodes=_number(found["nodes"]),
            images=_number(found["images"]),
            own_images=own_images,
            image_size=size,
            channels=channels,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoadingError("its reader gave no description of the branches") from error


def _branch(told: dict[str, Any], size: ImageSize, channels: int) -> Branch:
    if told["state"] not in get_args(State):
        raise ValueError(told["state"])
    plain: dict[str, Any] = {name: _texts(told[name]) for name in _LISTS}
    plain |= {name: _number(told[name]) for name in _NUMBERS}
    plain |= {"state": told["state"], "output": printable(told["output"], 60)}
    if "effect" not in told:
        return Branch(**plain, why=printable(told["why"], 200))
    pixels = np.frombuffer(base64.b64decode(told["picture"], validate=True), dtype=np.uint8)
    return Branch(
        **plain,
        stamp=printable(told["stamp"], 100),
        share=float(told["share"]),
        change=float(told["change"]),
        box=tuple(_number(each) for each in told["box"]),
        effect=Effect(**{name: _whole(told["effect"][name]) for name in Effect.__annotations__}),
        picture=pixels.reshape(*height_width(size), channels),
    )


def _texts(lines: Any) -> tuple[str, ...]:
    return tuple(printable(line, 200) for line in list(lines)[:_MOST])


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(type(value).__name__)
    return value


def _number(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError(value)
    return int(value)
