"""Simplify an ONNX graph: functions inlined, identities folded, names replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wm_victim.loading.onnx_operators import SIZE_INPUTS

_CONSTANTS = ("value", "value_float", "value_floats", "value_int", "value_ints")
# Operators that return a size: it depends on an image's shape at most, never on its pixels.
_SHAPES = ("Shape", "Size")


def simplify(model: Any, *, image: str, output: str) -> Any:
    """The part of a graph that leads from the image to one output, in its plainest form.

    Files of torch's older exporter share weights through Identity nodes, which importers do not
    handle. Names become v0, v1, ...: importers turn them into attributes, which could collide.

    Args:
        model: An ONNX model, checked by `scan_onnx`; it is changed.
        image: The name of the input that takes the images.
        output: The name of the output to keep.

    Returns:
        The model.

    Raises:
        ValueError: A graph whose memory or steps depend on the pixels, a value that nothing gives,
            or a constant that is no number.
    """
    import onnx

    if model.functions:
        import onnx.inliner

        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    initial = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if not _constant(node, initial)]
    nodes, output = _fold(nodes, initial, output)
    nodes = _needed(nodes, output)
    refuse_sizes_from_pixels(nodes, image)
    used = {name for node in nodes for name in node.input} | {output}
    weights = [tensor for name, tensor in initial.items() if name in used and name != image]
    names = _rename(nodes, weights, image)
    if output not in names:
        raise ValueError("an output that nothing in the graph gives")
    ports = {value.name: value for value in graph.input}
    port = onnx.ValueInfoProto()
    port.CopyFrom(ports[image])
    port.name, port.doc_string = names[image], ""
    result = onnx.helper.make_tensor_value_info(names[output], onnx.TensorProto.FLOAT, None)
    plain = onnx.helper.make_graph(nodes, "graph", [port], [result], weights)
    opsets = [onnx.helper.make_opsetid("", _opset(model))]
    simplified = onnx.helper.make_model(plain, opset_imports=opsets)
    simplified.ir_version = min(max(model.ir_version, 4), 10)
    return simplified


def _opset(model: Any) -> int:
    return int(
        next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    )


def _constant(node: Any, initial: dict[str, Any]) -> bool:
    """Move a Constant node's value to the weights."""
    import numpy as np
    import onnx

    if node.op_type != "Constant":
        return False
    attribute = node.attribute[0] if len(node.attribute) == 1 else None
    if attribute is None or attribute.name not in _CONSTANTS:
        raise ValueError("a constant that is no number")
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
    else:
        kind = np.float32 if "float" in attribute.name else np.int64
        tensor = onnx.numpy_helper.from_array(np.array(value, dtype=kind))
    tensor.name = node.output[0]
    initial[tensor.name] = tensor
    return True


def _fold(nodes: list[Any], initial: dict[str, Any], output: str) -> tuple[list[Any], str]:
    """Remove Identity, and Dropout, which does nothing outside training."""
    alias: dict[str, str] = {}
    remaining = []
    for node in nodes:
        node.domain = ""
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        _no_training(node)
        dropout = node.op_type == "Dropout" and len(node.input) < 3
        if node.op_type == "Identity" or dropout:
            alias[node.output[0]] = node.input[0]
        else:
            remaining.append(node)
    return remaining, alias.get(output, output)


def _no_training(node: Any) -> None:
    """Remove the attribute that says "not in training", which the importer does not know."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == "training_mode":
            if attribute.i:
                raise ValueError(f"{node.op_type} in training mode: export it in evaluation mode")
            del node.attribute[index]
            return


def _needed(nodes: list[Any], output: str) -> list[Any]:
    """The nodes on which the output depends, in their order."""
    values, used = {output}, []
    for node in reversed(nodes):
        if values & set(node.output):
            values |= set(node.input)
            used.append(node)
    return used[::-1]


def refuse_sizes_from_pixels(nodes: Iterable[Any], image: str) -> None:
    """Refuse sizes that pixels decide: one image in a million could ask for all memory.

    ``nodes`` come in an order in which they can be computed; ``image`` is the name of the input.
    """
    pixels = {image}
    for node in nodes:
        if node.op_type in _SHAPES:
            continue
        sizes = SIZE_INPUTS.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if index in sizes and name in pixels:
                raise ValueError(f"a size that depends on the pixels, in {node.op_type}")
        if pixels & set(node.input):
            pixels |= set(node.output)


def _rename(nodes: Iterable[Any], weights: Iterable[Any], image: str) -> dict[str, str]:
    names = {image: "v0"}
    for tensor in weights:
        names[tensor.name] = f"v{len(names)}"
        tensor.name, tensor.doc_string = names[tensor.name], ""
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    for count, node in enumerate(nodes):
        for index, name in enumerate(node.input):
            if name and name not in names:
                raise ValueError("a value that nothing in the graph gives")
            node.input[index] = names.get(name, "")
        for index, name in enumerate(node.output):
            if name:
                names[name] = f"v{len(names)}"
                node.output[index] = names[name]
        node.name, node.doc_string = f"n{count}", ""
        del node.metadata_props[:]
    return names
