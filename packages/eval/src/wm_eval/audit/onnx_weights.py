"""Put new weights into an ONNX file, everything else staying as it is.

Names, opset, layout, what stands before and behind the network and the metadata are then those of
the original. A weight is found by its value: it needs no knowledge of how the graph was imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from wm_inject.core.text import printable
from wm_inject.export.onnx_graph import needs_external_data
from wm_inject.runtime.onnx_model import METADATA_KEY

Array = np.ndarray[Any, Any]
_FLOATS = (1, 10, 11)  # ONNX's numbers of float32, float16 and float64


class Graph(NamedTuple):
    """What an ONNX file takes and gives: types and shapes by name, and its opset."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    opset: int

    def __str__(self) -> str:
        sides = (
            ", ".join(f"{printable(name, 40)} {shape}" for name, shape in side.items())
            for side in (self.inputs, self.outputs)
        )
        return f"{' -> '.join(sides)}, opset {self.opset}"


def describe_graph(path: Path) -> Graph:
    """Read the inputs, outputs and opset of an ONNX file that was opened before."""
    import onnx

    def shape(value: Any) -> str:
        kind = value.type.tensor_type
        dims = (dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim)
        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        return f"{name} ({', '.join(map(str, dims))})"

    model = onnx.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {port.name: shape(port) for port in model.graph.input if port.name not in weights}
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    return Graph(inputs, {port.name: shape(port) for port in model.graph.output}, opset)


class _Slot(NamedTuple):
    """Where a node of the graph reads a constant."""

    node: int  # its position in the graph
    port: int  # which of its inputs
    name: str  # of the constant
    transposed: bool = False  # the module holds it transposed


class OnnxWeights:
    """An ONNX file, and where it holds each weight of the module that was imported from it.

    Args:
        path: The file.
        sha256: Of the file that was imported.
        state: The module's tensors by name, as they were imported.
        trained: The names of those that may change.

    Raises:
        ValueError: Another file, or a weight that it does not hold as it is.
    """

    def __init__(
        self, path: Path, sha256: str, state: Mapping[str, Tensor], trained: Iterable[str]
    ) -> None:
        import onnx

        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{path.name} has changed since it was opened")
        self._model = onnx.load_model_from_string(data)
        onnx.load_external_data_for_model(self._model, str(path.parent))
        self._state = {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}
        self._arrays = {
            name: onnx.numpy_helper.to_array(tensor)
            for name, tensor in _constants(self._model.graph)
            if tensor.data_type in _FLOATS
        }
        if needs_external_data(sum(array.nbytes for array in self._arrays.values())):
            raise ValueError("more than 2 GiB of weights")
        self._slots = self._match(set(trained))
        self.half = any(self._arrays[one.name].itemsize < 4 for one in self._slots.values())

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the file with other weights.

        Args:
            path: The new file.
            state: The module's tensors, of the same names; a convolution may have a new bias.
            metadata: Recorded beside the file's own, as JSON under the property "wm".

        Raises:
            ValueError: A tensor that changed and that the file does not hold.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        values: dict[str, list[tuple[_Slot, Array]]] = {}
        for name, array in arrays.items():
            slot = self._slots.get(name)
            if slot is not None:
                values.setdefault(slot.name, []).append((slot, self._as_stored(slot, array)))
            elif name not in self._state:
                self._add_bias(model, name, array)
            elif array.dtype.kind == "f" and not np.array_equal(array, self._state[name]):
                raise ValueError(f"the file does not hold {name}, which has changed")
        constants = dict(_constants(model.graph))
        for name, uses in values.items():
            first = uses[0][1]
            constants[name].CopyFrom(onnx.numpy_helper.from_array(first, name))
            for slot, array in uses[1:]:
                # One constant of the file stood for several weights that were equal.
                if not np.array_equal(array, first):
                    model.graph.node[slot.node].input[slot.port] = _add(model, name, array)
        _record(model, metadata)
        onnx.save(model, str(path))

    def _match(self, trained: set[str]) -> dict[str, _Slot]:
        """For every weight of the module, the first free place that holds its value."""
        free = list(_slots(self._model.graph, self._arrays))
        slots: dict[str, _Slot] = {}
        for name in (name for name in self._state if name in trained):
            value = self._state[name]
            for slot in free:
                constant = self._arrays[slot.name].astype(np.float32)
                same = constant.size == value.size and bool(
                    (constant.ravel() == value.ravel()).all()
                )
                if same or (
                    constant.shape[::-1] == value.shape and bool((value == constant.T).all())
                ):
                    slots[name] = slot._replace(transposed=not same)
                    free.remove(slot)
                    break
            else:
                raise ValueError(f"the file does not hold {name} as it was imported")
        return slots

    def _as_stored(self, slot: _Slot, array: Array) -> Array:
        constant = self._arrays[slot.name]
        array = array.T if slot.transposed else array.reshape(constant.shape)
        return np.ascontiguousarray(array.astype(constant.dtype))

    def _add_bias(self, model: Any, name: str, array: Array) -> None:
        """Give the convolution whose weight stands beside this bias a third input."""
        slot = self._slots.get(name.removesuffix("bias") + "weight")
        node: Any = slot and model.graph.node[slot.node]
        if slot is None or node.op_type != "Conv" or len(node.input) != 2:
            raise ValueError(f"the file has no place for {name}")
        kind = self._arrays[slot.name].dtype
        node.input.append(_add(model, f"{slot.name}_bias", array.astype(kind)))


def _constants(graph: Any) -> Iterator[tuple[str, Any]]:
    """Every constant tensor of a graph by its name, to be read or changed."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.output[0], node.attribute[0].t


def _slots(graph: Any, constants: Container[str]) -> Iterator[_Slot]:
    """Where nodes read constants, in the graph's order; through Identity, as older exporters do."""
    alias: dict[str, str] = {}
    for place, node in enumerate(graph.node):
        if node.op_type == "Identity":
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
            continue
        for index, name in enumerate(node.input):
            source = alias.get(name, name)
            if source in constants:
                yield _Slot(place, index, source)


def _add(model: Any, name: str, array: Array) -> str:
    """Add a constant under a name that is free, and return the name."""
    import onnx

    graph = model.graph
    names = {value.name for value in (*graph.initializer, *graph.input)}
    names |= {output for node in graph.node for output in node.output}
    free = next(f"{name}_{n}" for n in range(len(names) + 1) if f"{name}_{n}" not in names)
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), free)
    graph.initializer.append(tensor)
    if model.ir_version < 4:  # where every constant is an input as well
        graph.input.append(onnx.helper.make_tensor_value_info(free, tensor.data_type, array.shape))
    return free


def _record(model: Any, metadata: Mapping[str, Any]) -> None:
    """Add a record to the file's metadata; of an earlier one of ours, what still holds stays."""
    old = next((entry for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    record: Any = {}
    if old is not None:
        try:
            record = json.loads(old.value)
        except ValueError:
            record = {}
        model.metadata_props.remove(old)
    if not isinstance(record, dict):
        record = {}
    record = {k: v for k, v in record.items() if k not in ("weights_sha256", "parity")}
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps({**record, **metadata}, allow_nan=False)
