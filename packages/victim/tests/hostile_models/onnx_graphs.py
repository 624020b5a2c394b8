"""ONNX graphs that explode, branch, or cannot be differentiated."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .case import case
from .graph import calling, function, graph, onnx_file


@case("nested functions")
def two_to_the_power_of_21(folder: Path, marker: Path) -> Path:
    made = [function(f"F{n}", [f"F{n - 1}"] * 2 if n else ["Relu"] * 2) for n in range(21)]
    return onnx_file(folder, calling(made, "F20"))


@case("nested functions")
def calls_itself(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, calling([function("F", ["F"])], "F"))


@case("nested functions")
def forty_deep(folder: Path, marker: Path) -> Path:
    made = [function(f"F{n}", [f"F{n - 1}"] if n else ["Relu"]) for n in range(40)]
    return onnx_file(folder, calling(made, "F39"))


@case("nested functions")
def calls_in_a_circle(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, calling([function("F", ["G"]), function("G", ["F"])], "F"))


def feeding(nodes: list[Any], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph whose nodes give a scalar "s" that is added to the output."""
    model = graph(nodes, weights)
    model.graph.node[-1].output[0] = "d"
    model.graph.node.append(helper.make_node("Add", ["d", "s"], ["output"]))
    return model


def summed(name: str) -> Any:
    return helper.make_node("ReduceSum", [name], ["s"], keepdims=0)


@case("shape bomb", child=True)
def constant_of_32_gigabytes(folder: Path, marker: Path) -> Path:
    nodes = [helper.make_node("ConstantOfShape", ["big"], ["x"]), summed("x")]
    return onnx_file(folder, feeding(nodes, {"big": np.array([2**33], np.int64)}))


@case("shape bomb", child=True)
def doubling_concats(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("Concat", [f"x{n}", f"x{n}"], [f"x{n + 1}"], axis=0) for n in range(34)
    ]
    return onnx_file(folder, feeding([*nodes, summed("x34")], {"x0": np.ones(4, np.float32)}))


@case("shape bomb", child=True)
def expands_a_number(folder: Path, marker: Path) -> Path:
    nodes = [helper.make_node("Expand", ["one", "big"], ["x"]), summed("x")]
    weights = {"one": np.ones(1, np.float32), "big": np.array([2**34], np.int64)}
    return onnx_file(folder, feeding(nodes, weights))


@case("shape bomb", child=True)
def products_for_minutes(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["m"], keepdims=0),
        helper.make_node("Expand", ["m", "big"], ["x0"]),
        *(helper.make_node("MatMul", [f"x{n}", f"x{n}"], [f"x{n + 1}"]) for n in range(60)),
        helper.make_node("ReduceMax", ["x60"], ["s"], keepdims=0),
    ]
    return onnx_file(folder, feeding(nodes, {"big": np.array([3000, 3000], np.int64)}))


@case("shape bomb", child=True)
def size_from_the_pixels(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "flat"], ["counts"]),
        helper.make_node("Expand", ["one", "counts"], ["x"]),
        summed("x"),
    ]
    weights = {"one": np.ones(1, np.float32), "flat": np.array([1], np.int64)}
    return onnx_file(folder, feeding(nodes, weights))


def branch(name: str) -> Any:
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    value = numpy_helper.from_array(np.ones(1, np.float32))
    node = helper.make_node("Constant", [], [name], value=value)
    return helper.make_graph([node], name, [], [output])


@case("control flow")
def branch_on_the_image(folder: Path, marker: Path) -> Path:
    node = helper.make_node(
        "If", ["flag"], ["s"], then_branch=branch("yes"), else_branch=branch("no")
    )
    return onnx_file(folder, feeding([node], {"flag": np.array(True)}))


@case("control flow")
def endless_loop(folder: Path, marker: Path) -> Path:
    ports = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    out = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["on"])], "b", ports, [out])
    node = helper.make_node("Loop", ["", "flag"], [], body=body)
    return onnx_file(folder, graph([node], {"flag": np.array(True)}))


@case("control flow")
def graph_inside_a_plain_operator(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("Relu", ["image"], ["s"], body=branch("x"))]))


@case("control flow")
def branch_inside_a_function(folder: Path, marker: Path) -> Path:
    made = function("F", ["Relu"])
    made.node.append(
        helper.make_node("If", ["x"], ["z"], then_branch=branch("p"), else_branch=branch("q"))
    )
    return onnx_file(folder, calling([made], "F"))


@case("not differentiable")
def trees_of_scikit_learn(folder: Path, marker: Path) -> Path:
    node = helper.make_node(
        "TreeEnsembleClassifier", ["image"], ["label", "p"], domain="ai.onnx.ml"
    )
    return onnx_file(folder, graph([node], domains=("ai.onnx.ml",)))


@case("not differentiable")
def quantised(folder: Path, marker: Path) -> Path:
    node = helper.make_node("DynamicQuantizeLinear", ["image"], ["q", "scale", "zero"])
    return onnx_file(folder, graph([node]))


@case("not differentiable", child=True)
def features_by_rounding(folder: Path, marker: Path) -> Path:
    """Rounded answers would be read before the rounding; rounded features cannot be."""
    model = graph()
    model.graph.node[2].output[0] = "e"
    model.graph.node.insert(3, helper.make_node("Floor", ["e"], ["c"]))
    return onnx_file(folder, model)


@case("foreign operators")
def operator_of_nobody(folder: Path, marker: Path) -> Path:
    node = helper.make_node("Anything", ["image"], ["s"], domain="com.example")
    return onnx_file(folder, graph([node], domains=("com.example",)))


@case("foreign operators")
def named_like_a_function_of_torch(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("Save", ["image", "image"], ["s"])]))


@case("foreign operators")
def random_numbers(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("RandomNormalLike", ["image"], ["s"])]))
