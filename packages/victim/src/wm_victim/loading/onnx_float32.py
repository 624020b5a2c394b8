"""Graphs in half, bfloat16 or double precision, turned into float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_HALVES, _DOUBLE, _FLOAT = (10, 16), 11, 1
_NAMES = {10: "float16", 16: "bfloat16", 11: "float64"}
_TYPE_ATTRIBUTES = {("Cast", "to"), ("EyeLike", "dtype")}


def to_float32(model: Any) -> tuple[Any, list[str]]:
    """A model whose numbers are float32, and the names of the types that it had instead.

    Half precision is always replaced; float64 only where images or answers are float64: inside a
    graph it stands for sizes. The first is given back as it is if there is nothing to replace.
    """
    if model.functions:
        import onnx.inliner

        model = onnx.inliner.inline_local_functions(model)
    ports = [*model.graph.input, *model.graph.output]
    kinds = {*_HALVES}
    if any(port.type.tensor_type.elem_type == _DOUBLE for port in ports):
        kinds.add(_DOUBLE)
    present: set[int] = set()
    for tensor in _tensors(model):
        if tensor.data_type in kinds:
            present.add(tensor.data_type)
            _as_float32(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name) in _TYPE_ATTRIBUTES and attribute.i in kinds:
                present.add(attribute.i)
                attribute.i = _FLOAT
    for port in ports:
        if port.type.tensor_type.elem_type in kinds:
            present.add(port.type.tensor_type.elem_type)
            port.type.tensor_type.elem_type = _FLOAT
    if present:
        del model.graph.value_info[:]
    return model, [_NAMES[kind] for kind in sorted(present)]


def _tensors(model: Any) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _as_float32(tensor: Any) -> None:
    import numpy as np
    import onnx

    name, values = tensor.name, onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
