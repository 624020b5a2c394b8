"""Where a value that skips the trained layers meets one that went through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wm_victim.branches.graph_view import GraphView

# Inputs that choose instead of being computed with, by position.
_CHOOSING = {"Where": 0, "If": 0, "Gather": 1, "GatherElements": 1, "GatherND": 1, "Compress": 1}
_CHOOSING |= {"ScatterND": 1, "ScatterElements": 1, "Loop": 1, "OneHot": 0}
_SMALLER = 4  # a value of so many times fewer numbers acts on the other, not the other way round


@dataclass(frozen=True)
class Side:
    """A value that joins others from a way around the trained layers.

    Args:
        value: Its name.
        joins: Numbers of the nodes where it joins.
    """

    value: str
    joins: tuple[int, ...]


def find_sides(view: GraphView, sizes: Mapping[str, int]) -> list[Side]:
    """All values that may steer the answer from the side, the shallowest first.

    A value is such a side where it meets one that trained layers gave which it has not passed
    itself, where it takes the place of an input that chooses (a condition, an index), or where it
    acts on a value that is much larger. Skip connections and squeeze-and-excitation are sides as
    well: what tells a backdoor from them is how they behave.

    Args:
        view: The graph.
        sizes: By value: how many numbers it has, where that is known.
    """
    joins: dict[str, list[int]] = {}
    for place, node in enumerate(view.nodes):
        inputs = [name for name in view.inputs[place] if name in view.pixels]
        if len(inputs) < 2:
            continue
        choosing = _CHOOSING.get(node.op_type, -1)
        chooser = node.input[choosing] if 0 <= choosing < len(node.input) else ""
        for name in inputs:
            others = [other for other in inputs if other != name]
            layers = 0
            for other in others:
                layers |= view.layers[other]
            beyond = layers & ~view.layers[name]
            largest = max(sizes.get(other, 0) for other in others)
            acts = _SMALLER * sizes.get(name, largest) <= largest
            if name != view.image and view.is_shallow(name) and (beyond or acts or name == chooser):
                joins.setdefault(name, []).append(place)
    order = sorted(joins, key=lambda name: (view.layers[name].bit_count(), view.producer[name]))
    return [Side(name, tuple(joins[name])) for name in order]
