"""Turn the middle of a graph to float16, and leave the image around it alone.

The converters that there are send every value through float16, the image among them: eleven bits
where a faint residual is added to it. Here only what lies between the first and the last matrix
product is converted; the codec before and the sum behind stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Products of matrices: all that a lower precision is worth its error for.
_HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
_FLOAT, _HALF = 1, 10  # of onnx.TensorProto
_LARGEST = 65504.0  # of float16
_FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that an operator wants in float32 all the same


def halve(source: Path, out: Path) -> None:
    """Compute in float16 what lies between the first and the last matrix product of each path.

    Inputs and outputs keep their types.

    Raises:
        ValueError: A model without a matrix product, or one with branches or loops.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        raise ValueError("expected a model without branches or loops for float16")
    _Halving(model.graph).run()
    onnx.save(model, str(out))


class _Halving:
    """The work on one graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        inside = _between(graph.node)
        self.inside = [number in inside for number in range(len(graph.node))]
        self.weights = {one.name: one for one in graph.initializer}
        declared = (*graph.value_info, *graph.input, *graph.output)
        self.floats = {v.name for v in declared if v.type.tensor_type.elem_type == _FLOAT}
        self.floats |= {name for name, one in self.weights.items() if one.data_type == _FLOAT}
        self.halves = {
            name
            for node, half in zip(graph.node, self.inside, strict=True)
            for name in node.output
            if half and name in self.floats
        }
        self.nodes: list[Any] = []
        self.cast: set[str] = set()

    def run(self) -> None:
        outputs = {one.name for one in self.graph.output}
        for node, half in zip(list(self.graph.node), self.inside, strict=True):
            kept = _FLOAT_ONLY.get(node.op_type, ()) if half else range(len(node.input))
            for place, name in enumerate(node.input):
                node.input[place] = self._wanted(name, half=place not in kept)
            if half:
                _convert_attributes(node)
                for place, name in enumerate(node.output):
                    if name in self.halves and name in outputs:  # the name stays with the output
                        node.output[place] = f"{name}_half"
            self.nodes.append(node)
            for name in node.output:
                origin = name.removesuffix("_half")
                if half and origin in outputs and origin in self.halves:
                    self._add_cast(name, origin, _FLOAT)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        for value in self.graph.value_info:
            if value.name in self.halves:
                value.type.tensor_type.elem_type = _HALF
        used = {name for node in self.nodes for name in node.input} | outputs
        for one in [one for one in self.graph.initializer if one.name not in used]:
            self.graph.initializer.remove(one)

    def _wanted(self, name: str, *, half: bool) -> str:
        """The name under which a node finds a value in the precision it works in."""
        if name not in self.floats:
            return name
        if name in self.weights:
            return self._half_weight(name) if half else name
        if half == (name in self.halves):
            return f"{name}_half" if half and self._is_output(name) else name
        if not half and self._is_output(name):
            return name  # cast already, as the graph's output
        new = f"{name}_{'half' if half else 'float'}"
        if new not in self.cast:
            self._add_cast(name, new, _HALF if half else _FLOAT)
        return new

    def _is_output(self, name: str) -> bool:
        return any(one.name == name for one in self.graph.output)

    def _add_cast(self, name: str, new: str, to: int) -> None:
        from onnx import helper

        self.cast.add(new)
        self.nodes.append(helper.make_node("Cast", [name], [new], name=f"cast_{new}", to=to))

    def _half_weight(self, name: str) -> str:
        from onnx import numpy_helper

        new = f"{name}_half"
        if new not in self.cast:
            self.cast.add(new)
            values = _half(numpy_helper.to_array(self.weights[name]))
            self.graph.initializer.append(numpy_helper.from_array(values, new))
        return new


def _half(values: Any) -> Any:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)


def _convert_attributes(node: Any) -> None:
    """Constants and casts that say float32 are to say float16."""
    from onnx import numpy_helper

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
            attribute.i = _HALF
        elif attribute.HasField("t") and attribute.t.data_type == _FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(attribute.t))))


def _between(nodes: Sequence[Any]) -> set[int]:
    """Numbers of the nodes with a matrix product on the way to them and on the way from them."""
    made = {name: number for number, node in enumerate(nodes) for name in node.output}
    heavy = [number for number, node in enumerate(nodes) if node.op_type in _HEAVY]
    if not heavy:
        raise ValueError("expected a model with matrix products for float16, found none")
    users: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            users.setdefault(name, []).append(number)

    def before(number: int) -> Iterator[int]:
        return (made[name] for name in nodes[number].input if name in made)

    def after(number: int) -> Iterator[int]:
        return (user for name in nodes[number].output for user in users.get(name, ()))

    return _reach(heavy, before) & _reach(heavy, after)


def _reach(start: Sequence[int], following: Callable[[int], Iterator[int]]) -> set[int]:
    """Every node that can be reached, the first ones among them."""
    found, waiting = set(start), list(start)
    while waiting:
        for number in following(waiting.pop()):
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found
