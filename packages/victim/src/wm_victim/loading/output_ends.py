"""Where a graph's logits are: what follows them and keeps their order is taken off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wm_victim.loading.onnx_order import rises

Array = np.ndarray[Any, Any]
OpenSession = Callable[[bytes], Any]  # a serialised graph -> ONNX Runtime's session
# Operators that treat all classes alike if their constants do: they work number by number, along
# whole axes, or change a shape. None of them picks a class by its position.
_NAMES = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh Cast CastLike Ceil Celu Clip Cos Cosh Div Elu Equal
    Erf Exp Expand Flatten Floor Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity
    IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul
    Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Round Selu Shape Shrink Sigmoid Sign Sin Sinh Size Softmax Softplus Softsign Sqrt Squeeze Sub
    Sum Swish Tan Tanh ThresholdedRelu Transpose Unsqueeze Where Xor
"""
_ALIKE = frozenset(_NAMES.split())
_SHAPES = ("Shape", "Size")
_ONE_VALUE = ("Reshape", "Expand", "Squeeze", "Unsqueeze")  # further inputs are shapes and axes
_MOST = 64  # operators behind the logits
_SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)
_ROUNDING = 2e-3  # of a row's largest number, for tails in half precision
_UNIQUE = 0.9  # of the rows of some scale have one highest class: the outputs say something


class End(NamedTuple):
    """What follows the logits of a graph.

    Args:
        logits: The logits ``(N, K)`` of the images that the graph was tried on.
        operators: What was taken off, in order.
    """

    logits: Array
    operators: tuple[str, ...]


def cut_end(
    model: Any,
    expected: Array,
    *,
    batch: int | None,
    open_session: OpenSession,
    values: Callable[[Any, Sequence[str]], list[Array]],
) -> End | None:
    """Cut a plain graph at its logits, in place.

    The logits are the earliest values (N, K) through which alone the outputs depend on the image
    and whose order within a row the outputs keep, up to ties: before softmax, sigmoid, clipping,
    rounding or scaling, however they are spelled. That follows from the operators whatever the
    numbers are (`onnx_order.rises`), and is tried on rows of many scales. It holds for all classes,
    since neither operators nor constants tell classes apart.

    Args:
        model: From `simplify`.
        expected: Its outputs ``(N, K)`` for the images of ``values``.
        batch: The graph's batch size if that is fixed.
        open_session: Opens a graph with ONNX Runtime.
        values: A graph and names of values in it -> these values, for some images.

    Returns:
        What was taken off; None if the outputs are the logits.
    """
    rows = _rows(expected.shape[1])
    tails = [
        tail
        for tail in _tails(model, batch or 1, open_session)
        if tail.rises() and _keeps_order(tail.run(rows.reshape(-1, expected.shape[1])), rows)
    ]
    if not tails:
        return None
    arrays = values(model, [tail.value for tail in tails])
    for tail, array in reversed(list(zip(tails, arrays, strict=True))):  # the earliest first
        if array.shape not in (expected.shape, (*expected.shape, 1, 1)):
            continue
        logits = array.reshape(expected.shape).astype(np.float32)
        outputs = tail.run(logits)
        bound = _ROUNDING * float(np.abs(expected).max())
        if outputs is not None and float(np.abs(outputs - expected).max()) <= bound:
            operators = tuple(model.graph.node[index].op_type for index in tail.nodes)
            _shorten(model.graph, tail, half=array.dtype != np.float32)
            return End(logits, operators)
    return None


class _Tail:
    """The part of a graph from one value to the output: ``nodes`` are numbers of its nodes."""

    def __init__(
        self,
        model: Any,
        value: str,
        nodes: list[int],
        sizes: set[str],
        batch: int,
        open_session: OpenSession,
    ) -> None:
        self.value, self.nodes = value, nodes
        self._model, self._batch, self._open = model, batch, open_session
        last = model.graph.output[0].name
        inner = [name for index in nodes for name in model.graph.node[index].output]
        self._names = [last, *(name for name in inner if name and name not in {last, *sizes})]

    def rises(self) -> bool:
        """Whether outputs never fall where the value rises, by what its operators are."""
        nodes = [self._model.graph.node[index] for index in self.nodes]
        inputs = {name for node in nodes for name in node.input}
        numbers = {}
        for tensor in self._model.graph.initializer:
            if tensor.name in inputs and (number := _one_number(tensor)) is not None:
                numbers[tensor.name] = number
        return rises(nodes, self.value, self._model.graph.output[0].name, numbers)

    def run(self, rows: Array) -> Array | None:
        """Outputs ``(N, K)`` of rows ``(N, K)``; None where it takes none, or mixes classes."""
        count, classes = rows.shape
        size = self._batch if self._batch > 1 else count
        filled = np.concatenate([rows, np.repeat(rows[:1], -count % size, axis=0)])
        for dtype, axes in itertools.product(("float32", "float16"), ((), (1, 1))):
            batches = filled.reshape(-1, size, classes, *axes).astype(dtype)
            # ONNX Runtime has an exception class for each kind of misfit, with no common base.
            try:
                session = self._session(dtype)
                runs = [session.run(self._names, {self.value: part}) for part in batches]
            except Exception:
                continue
            if all(_row_by_row(run, size, classes) for run in runs):
                return np.concatenate([run[0].reshape(size, classes) for run in runs])[:count]
        return None

    def _session(self, dtype: str) -> Any:
        from onnx import ValueInfoProto, helper

        nodes = [self._model.graph.node[index] for index in self.nodes]
        inputs = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in self._model.graph.initializer if tensor.name in inputs]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        port = helper.make_tensor_value_info(self.value, kind, None)
        outputs = [ValueInfoProto(name=name) for name in self._names]
        graph = helper.make_graph(nodes, "end", [port], outputs, weights)
        tail = helper.make_model(graph, opset_imports=self._model.opset_import)
        tail.ir_version = self._model.ir_version
        return self._open(tail.SerializeToString())


def _tails(model: Any, batch: int, open_session: OpenSession) -> Iterator[_Tail]:
    """From every value through which alone the output depends on the image, from the last back."""
    nodes = list(model.graph.node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = _sizes(nodes, constants)
    producer = {name: index for index, node in enumerate(nodes) for name in node.output}
    frontier, inside = {model.graph.output[0].name}, set[int]()
    while len(inside) < _MOST:
        index = max(producer.get(name, -1) for name in frontier)
        if index < 0 or not (_alike(nodes[index], constants) or set(nodes[index].output) <= sizes):
            return
        inside.add(index)
        frontier -= set(nodes[index].output)
        frontier |= {name for name in nodes[index].input if name and name not in constants}
        if len(frontier) == 1 and frontier <= producer.keys():
            (value,) = frontier
            yield _Tail(model, value, sorted(inside), sizes, batch, open_session)


def _sizes(nodes: Sequence[Any], constants: Mapping[str, Any]) -> set[str]:
    """Values that depend on shapes alone."""
    sizes: set[str] = set()
    for node in nodes:
        inputs = {name for name in node.input if name}
        if node.op_type in _SHAPES or (inputs & sizes and inputs <= sizes | constants.keys()):
            sizes |= set(node.output)
    return sizes


def _alike(node: Any, constants: Mapping[str, Any]) -> bool:
    """Whether a node treats all classes alike."""
    if node.op_type not in _ALIKE:
        return False
    one = node.op_type in _ONE_VALUE or node.op_type.startswith("Reduce")
    data = node.input[:1] if one else node.input
    return all(_one_number(constants[name]) is not None for name in data if name in constants)


def _one_number(tensor: Any) -> float | None:
    """The number of which a constant is made; None if they differ."""
    from onnx import numpy_helper

    numbers = numpy_helper.to_array(tensor).ravel()
    alike = numbers.size > 0 and bool((numbers == numbers[0]).all())
    return float(numbers[0]) if alike else None


def _row_by_row(values: Sequence[Array], count: int, classes: int) -> bool:
    """Whether every value has a number for each class of each row, or one for each row."""
    shapes = [tuple(n for n in value.shape if n != 1) for value in values]
    allowed = [tuple(n for n in each if n != 1) for each in ((count, classes), (count,), ())]
    return values[0].size == count * classes and all(shape in allowed for shape in shapes)


def _rows(classes: int) -> Array:
    """Rows (kind, row, class): of every scale, around zero, above it and below it."""
    random = np.random.default_rng(7)
    each = max(2, min(8, 2**13 // classes))
    kinds = [(scale, shift) for scale in _SCALES for shift in (0.0, 3.0, -3.0)]
    rows = [scale * (random.standard_normal((each, classes)) + shift) for scale, shift in kinds]
    return np.stack(rows).astype(np.float32)


def _keeps_order(outputs: Array | None, rows: Array) -> bool:
    """Whether outputs rise with the numbers of their row, except where they are equal."""
    if outputs is None or np.array_equal(outputs, rows.reshape(outputs.shape)):
        return False  # nothing to take off
    outputs = outputs.astype(np.float64).reshape(rows.shape)
    finite = np.isfinite(outputs).all(2)  # exp overflows in rows that no classifier gives
    if finite.mean() < 0.5:
        return False
    outputs[~finite] = 0
    rising = np.take_along_axis(outputs, rows.argsort(2), axis=2)[finite]
    fall = (np.maximum.accumulate(rising, axis=1) - rising).max(1)
    if bool((fall > _ROUNDING * np.abs(rising).max(1)).any()):
        return False
    top = np.take_along_axis(outputs, rows.argmax(2)[..., None], axis=2)[..., 0]
    highest = outputs.max(2)
    unique = (outputs == highest[..., None]).sum(2) == 1
    right = np.equal(top, highest)
    return bool(right[finite].mean() >= 0.98 and (right & unique & finite).mean(1).max() >= _UNIQUE)


def _shorten(graph: Any, tail: _Tail, *, half: bool) -> None:
    """End a graph with the value that a tail begins with, in single precision."""
    from onnx import TensorProto, helper

    for index in reversed(tail.nodes):
        del graph.node[index]
    name = tail.value
    if half:
        names = [name for node in graph.node for name in (*node.input, *node.output) if name]
        name = f"v{1 + max(int(each[1:]) for each in names)}"
        graph.node.append(helper.make_node("Cast", [tail.value], [name], to=TensorProto.FLOAT))
    inputs = {each for node in graph.node for each in node.input}
    unused = [
        number for number, tensor in enumerate(graph.initializer) if tensor.name not in inputs
    ]
    for number in reversed(unused):
        del graph.initializer[number]
    graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
