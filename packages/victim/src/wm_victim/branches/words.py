"""A branch in words: the operators that decide, what they read, and where they join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wm_inject.core.text import printable
from wm_victim.branches.graph_view import GraphView, inner_graphs, inner_nodes
from wm_victim.branches.joins import Side

# They decide. Everything that a network computes with smoothly is not among them.
_DECIDING = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not", "Xor"}
_DECIDING |= {"Where", "If", "Loop", "Sign", "Floor", "Ceil", "Round", "Mod", "ArgMax", "ArgMin"}
_DECIDING |= {"TopK", "IsNaN", "IsInf", "OneHot", "NonZero", "BitwiseAnd", "BitShift"}
# They saturate: behind a trained layer as activations do, before any of them as decisions do.
_SATURATING = {"Min", "Max", "Clip", "Relu", "ThresholdedRelu", "Shrink"}
_MOST = 200


def decides(view: GraphView, place: int) -> bool:
    """Whether a node decides, and is no activation behind a trained layer."""
    node = view.nodes[place]
    early = not any(view.layers[name] for name in view.inputs[place] if name in view.pixels)
    return node.op_type in _DECIDING or (early and node.op_type in _SATURATING)


def _turns(view: GraphView, place: int) -> bool:
    return view.nodes[place].op_type in _DECIDING | _SATURATING


def own_nodes(view: GraphView, sides: Sequence[Side]) -> list[int]:
    """The nodes of a branch, in order: before its values, but not on the way that they join."""
    before: set[int] = set()
    trunk: set[int] = set()
    values = {side.value for side in sides}
    for side in sides:
        before |= view.before(side.value)
        for place in side.joins:
            for name in view.inputs[place]:
                if name in view.pixels and name not in values and view.layers[name]:
                    trunk |= view.before(name)
    others = {
        place for place in before & trunk if any(view.layers[n] for n in view.nodes[place].output)
    }
    return sorted(before - others)


def describe(view: GraphView, sides: Sequence[Side]) -> dict[str, Any]:
    """What a branch is made of, as JSON types, each node by its operator and name."""
    own = own_nodes(view, sides)
    joins = sorted({place for side in sides for place in side.joins})
    inside = {name for place in own for name in view.nodes[place].output}
    reads = {name for place in own for name in view.inputs[place] if name in view.pixels} - inside
    conditions = [view.nodes[place] for place in (*own, *joins)]
    return {
        "operators": [view.title(place) for place in own[:_MOST]],
        "decides": [view.title(place) for place in own if _turns(view, place)][:_MOST],
        "reads": [_read(view, name) for name in sorted(reads)][:_MOST] or ["the pixels"],
        "joins": [view.title(place) for place in joins][:_MOST],
        "values": [printable(side.value, 60) for side in sides],
        "sides": [line for node in conditions for line in _sides_of(node)][:_MOST],
        "output": printable(view.answer, 60),
        "layers": max(view.layers[side.value].bit_count() for side in sides),
        "all_layers": view.depth,
        "before_layers": all(
            not view.layers[name] for place in joins for name in view.nodes[place].output if name
        ),
    }


def _read(view: GraphView, name: str) -> str:
    if name == view.image:
        return "the pixels"
    layers = view.layers[name].bit_count()
    return f"{view.title(view.producer[name])}, after {layers} of {view.depth} trained layers"


def _sides_of(node: Any) -> list[str]:
    """What each side of an If leads to."""
    if node.op_type != "If":
        return []
    lines = []
    for attribute, graph in zip(node.attribute, inner_graphs(node), strict=False):
        kinds = [inner.op_type for inner in inner_nodes(node) if inner in graph.node]
        what = ", ".join(kinds[:6]) + (" ..." if len(kinds) > 6 else "")
        side = attribute.name.removesuffix("_branch")
        lines.append(f"If {printable(node.name, 60)!r}, {side}: {what or 'a value as it is'}")
    return lines
