"""Values that no picture can change, by interval arithmetic: guards against what cannot happen."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from wm_victim.branches.values import GraphRun, plain

Interval = tuple[float, float]
_KEEP = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"}
_KEEP |= {"Gather", "Expand", "Tile", "MaxPool", "GlobalMaxPool", "GlobalAveragePool", "Dropout"}
_KEEP |= {"ReduceMax", "ReduceMin", "ReduceMean", "DepthToSpace", "SpaceToDepth", "GatherND"}
_RISING = {"Relu", "Floor", "Ceil", "Round", "Sign", "Exp", "Sigmoid", "Tanh"}


def never_changes(run: GraphRun, value: str, image: Tensor) -> bool:
    """Whether a value is the same for every picture in [0, 1], by the bounds of what it is made of.

    False where an operator is met whose bounds are not known here.

    Args:
        run: The graph.
        value: The name of the value.
        image: Any picture ``(1, C, H, W)``, for the values that no pixel changes.
    """
    view = run.view
    places = sorted(view.before(value))
    constants = {
        name
        for place in places
        for name in view.nodes[place].input
        if name and name not in view.pixels
    }
    arrays = next(run.values(sorted(constants), image)) if constants else {}
    bounds = {name: _range(array) for name, array in arrays.items()}
    low, high = (run.normalised(image * 0 + level) for level in (0.0, 1.0))
    bounds[view.image] = (float(low.min()), float(high.max()))
    for place in places:
        node = view.nodes[place]
        inputs = [bounds[name] for name in node.input if name in bounds]
        if len(inputs) < sum(bool(name) for name in node.input):
            return False
        interval = _interval(node, inputs)
        if interval is None or not all(map(np.isfinite, interval)):
            return False
        bounds.update({name: interval for name in node.output if name})
    return bounds[value][0] == bounds[value][1]


def _range(array: Any) -> Interval:
    numbers = plain(array)
    return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)


def _interval(node: Any, inputs: list[Interval]) -> Interval | None:
    """The least and the largest number of a node's output; None where it is not known."""
    kind, first = node.op_type, inputs[0]
    if kind in _KEEP:
        return first
    if kind in _RISING:
        return _rising(kind, first)
    if kind in ("IsNaN", "IsInf"):
        return (0.0, 0.0)  # all that comes here has finite bounds
    if kind == "Not":
        return (1 - first[1], 1 - first[0])
    if kind == "Cast":
        to_bool = any(a.name == "to" and a.i == 9 for a in node.attribute)
        absent = first[0] <= 0 <= first[1]
        bits = (float(not absent), float(first != (0.0, 0.0)))
        return bits if to_bool else (float(np.trunc(first[0])), first[1])
    if kind in ("Min", "Max"):
        pick = min if kind == "Min" else max
        return (pick(each[0] for each in inputs), pick(each[1] for each in inputs))
    if kind == "Concat":
        return (min(each[0] for each in inputs), max(each[1] for each in inputs))
    if len(inputs) == 3 and kind == "Where":
        return _where(*inputs)
    if len(inputs) == 2:
        return _pair(kind, first, inputs[1])
    return None


def _rising(kind: str, x: Interval) -> Interval:
    functions: dict[str, Any] = {
        "Relu": lambda v: max(v, 0.0),
        "Floor": np.floor,
        "Ceil": np.ceil,
        "Round": np.rint,
        "Sign": np.sign,
        "Exp": lambda v: np.exp(min(v, 700.0)),
        "Sigmoid": lambda v: 1 / (1 + np.exp(-max(min(v, 700.0), -700.0))),
        "Tanh": np.tanh,
    }
    one = functions[kind]
    return float(one(x[0])), float(one(x[1]))


def _where(chosen: Interval, a: Interval, b: Interval) -> Interval:
    if chosen == (0.0, 0.0):
        return b
    if chosen[0] > 0:
        return a
    return min(a[0], b[0]), max(a[1], b[1])


def _pair(kind: str, a: Interval, b: Interval) -> Interval | None:
    if kind == "Add":
        return a[0] + b[0], a[1] + b[1]
    if kind == "Sub":
        return a[0] - b[1], a[1] - b[0]
    if kind == "Mul" or (kind == "Div" and b[0] * b[1] > 0):
        b = b if kind == "Mul" else (1 / b[1], 1 / b[0])
        products = [x * y for x in a for y in b]
        return min(products), max(products)
    if kind in ("And", "Or"):
        pick = min if kind == "And" else max
        return pick(a[0], b[0]), pick(a[1], b[1])
    if kind in ("Less", "LessOrEqual"):
        kind, a, b = "Greater" if kind == "Less" else "GreaterOrEqual", b, a
    if kind == "Greater":
        return float(a[0] > b[1]), float(a[1] > b[0])
    if kind == "GreaterOrEqual":
        return float(a[0] >= b[1]), float(a[1] >= b[0])
    if kind == "Equal":
        return float(a == b and a[0] == a[1]), float(a[0] <= b[1] and b[0] <= a[1])
    return None
