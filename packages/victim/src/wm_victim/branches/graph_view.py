"""An ONNX graph as values: what each depends on, and which trained layers lie before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wm_inject.core.text import printable

# Layers whose numbers are learned, if one of their inputs does not depend on the picture.
_TRAINED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "ConvInteger", "MatMulInteger"}
_TRAINED |= {"QLinearConv", "QLinearMatMul", "LSTM", "GRU", "RNN"}
# They return a size, which no pixel changes.
_SIZES = ("Shape", "Size")
_NODE_SHARE, _NUMBER_SHARE = 0.5, 0.1


class GraphView:
    """The part of a graph that leads to the answer.

    Args:
        model: An ONNX model without functions; it is not changed.
        image: The name of the input that takes pictures.
        answer: The name of the output that answers.

    Attributes:
        nodes: The nodes that the answer depends on, in order.
        pixels: Names of values that depend on the picture.
        layers: By value: the trained layers before it, as bits.
        producer: By value: the number of the node that gives it.
    """

    def __init__(self, model: Any, *, image: str, answer: str) -> None:
        self.model, self.image, self.answer = model, image, answer
        self.numbers = {tensor.name: _count(tensor) for tensor in model.graph.initializer}
        self.nodes = needed(model.graph.node, {answer})
        self.inputs = [inputs_of(node) for node in self.nodes]
        self.producer = {
            name: place for place, node in enumerate(self.nodes) for name in node.output if name
        }
        self.pixels = {image}
        self.layers: dict[str, int] = {image: 0}
        self._weights: list[int] = []  # by layer: how many numbers it has
        for node, inputs in zip(self.nodes, self.inputs, strict=True):
            self._follow(node, inputs)

    def _follow(self, node: Any, inputs: list[str]) -> None:
        before = [name for name in inputs if name in self.pixels]
        if not before or node.op_type in _SIZES:
            return
        layers = 0
        for name in before:
            layers |= self.layers[name]
        for inner in (node, *inner_nodes(node)):
            weights = [name for name in inner.input if name and name not in self.pixels]
            if inner.op_type in _TRAINED and weights:
                layers |= 1 << len(self._weights)
                self._weights.append(max(self.numbers.get(name, 1) for name in weights))
        for name in node.output:
            if name:
                self.pixels.add(name)
                self.layers[name] = layers

    @property
    def depth(self) -> int:
        """How many trained layers the answer depends on."""
        return self.layers[self.answer].bit_count()

    def is_shallow(self, value: str) -> bool:
        """Whether a value skips most of the trained layers, or most of their numbers."""
        mask = self.layers[value]
        numbers = sum(count for place, count in enumerate(self._weights) if mask >> place & 1)
        few = mask.bit_count() <= _NODE_SHARE * self.depth
        return few or numbers <= _NUMBER_SHARE * sum(self._weights)

    def before(self, value: str) -> set[int]:
        """Numbers of the nodes that a value is computed from and that see the picture."""
        places: set[int] = set()
        waiting = [value]
        while waiting:
            place = self.producer.get(waiting.pop(), -1)
            if place < 0 or place in places:
                continue
            places.add(place)
            waiting += [name for name in self.inputs[place] if name in self.pixels]
        return places

    def title(self, place: int) -> str:
        """A node by its operator and its own name, or that of its output."""
        node = self.nodes[place]
        name = node.name or next((name for name in node.output if name), "")
        return f"{printable(node.op_type, 40)} {printable(name, 60)!r}"


def inputs_of(node: Any) -> list[str]:
    """The values that a node reads, those that graphs inside it take from outside included."""
    names = [name for name in node.input if name]
    for graph in inner_graphs(node):
        inner_values = {value.name for value in (*graph.initializer, *graph.input)}
        for inner in graph.node:
            names += [name for name in inputs_of(inner) if name not in inner_values]
            inner_values |= set(inner.output)
        names += [value.name for value in graph.output if value.name not in inner_values]
    return list(dict.fromkeys(names))


def inner_graphs(node: Any) -> Iterator[Any]:
    """The graphs that a node holds: the sides of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def inner_nodes(node: Any) -> Iterator[Any]:
    """All nodes of the graphs that a node holds, of nested ones as well."""
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield inner
            yield from inner_nodes(inner)


def needed(nodes: Any, values: set[str], stop: set[str] = frozenset()) -> list[Any]:  # type: ignore[assignment]
    """The nodes that some values depend on, in their order, without those before ``stop``."""
    open_values, chain = values - stop, []
    for node in reversed(nodes):
        if open_values & set(node.output):
            open_values |= set(inputs_of(node)) - stop
            chain.append(node)
    return chain[::-1]


def _count(tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return int(count)
