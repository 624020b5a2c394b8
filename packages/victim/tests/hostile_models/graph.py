"""Small ONNX graphs, to be spoilt."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .case import put


def graph(
    nodes: list[Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    *,
    classes: int = 4,
    functions: list[Any] | None = None,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A small classifier of 8-pixel images; further nodes come first and lead nowhere."""
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(5, 3, 3, 3)).astype(np.float32)
    matrix = generator.normal(size=(5, classes)).astype(np.float32)
    own = [
        helper.make_node("Conv", ["image", "kernel"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["output"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", classes])
    arrays = {"kernel": kernel, "matrix": matrix, **(weights or {})}
    tensors = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    made = helper.make_graph([*(nodes or []), *own], "g", [image], [output], tensors)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(one, 1) for one in domains)]
    return helper.make_model(made, opset_imports=opsets, functions=functions or [], ir_version=9)


def onnx_file(folder: Path, model: onnx.ModelProto) -> Path:
    return put(folder, "a.onnx", model.SerializeToString())


def function(name: str, calls: list[str], *, leaf: str = "Relu") -> Any:
    names = ["x", *(f"v{n}" for n in range(len(calls) - 1)), "y"]
    nodes = [
        helper.make_node(call, [names[n]], [names[n + 1]], domain="" if call == leaf else "own")
        for n, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def calling(functions: list[Any], name: str) -> onnx.ModelProto:
    node = helper.make_node(name, ["image"], ["spare"], domain="own")
    return graph([node], functions=functions, domains=("own",))
