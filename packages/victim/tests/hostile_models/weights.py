"""Weights that lie in their header, in their numbers or in their shapes."""

import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from .case import ARCH, case, put
from .graph import graph, onnx_file


def weights(classes: int = 10, seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    import timm

    torch.manual_seed(seed)
    module = timm.create_model(ARCH.removeprefix("timm:"), pretrained=False, num_classes=classes)
    return OrderedDict((name, value.clone()) for name, value in module.state_dict().items())


def changed(folder: Path, name: str, value: float) -> Path:
    state = weights()
    state[name].view(-1)[0] = value
    path = folder / "a.safetensors"
    save_file(state, path)
    return path


# --- Headers that lie ---


def lying(folder: Path, header: Any, *, body: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return put(folder, "a.safetensors", struct.pack("<Q", size) + text + body)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> Any:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@case("header lies")
def longer_than_the_file(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8)}, length=2**40)


@case("header lies")
def a_hundred_megabytes(folder: Path, marker: Path) -> Path:
    return lying(folder, b'{"a":' + b" " * (100 << 20) + b"1}", body=b"")


@case("header lies")
def tensors_that_overlap(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8), "b": entry(4, 8)})


@case("header lies")
def shape_that_overflows(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8, [2**40, 2**40])})


@case("header lies")
def bytes_left_over(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8)}, body=bytes(64))


@case("header lies")
def one_name_twice(folder: Path, marker: Path) -> Path:
    one = json.dumps(entry(0, 8)).encode()
    return lying(folder, b'{"a":' + one + b',"a":' + one + b"}")


@case("header lies")
def three_hundred_thousand_tensors(folder: Path, marker: Path) -> Path:
    return lying(folder, {f"t{n}": entry(0, 0, [0]) for n in range(300_000)}, body=b"")


@case("header lies")
def nested_a_hundred_thousand_deep(folder: Path, marker: Path) -> Path:
    return lying(folder, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", body=b"")


@case("header lies")
def small_file_that_names_a_large_model(folder: Path, marker: Path) -> Path:
    config = {"name": "timm:vit_giant_patch14_224", "num_classes": 10, "channels": 3}
    config |= {"image_size": 224, "width": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    told = {"format": "wm-checkpoint-1", "kind": "classifier", "config": config, "metadata": {}}
    text = json.dumps({**told, "sha256": ""})
    return lying(folder, {"__metadata__": {"wm": text}, "a": entry(0, 8)})


# --- Numbers that are none ---


@case("bad numbers")
def nan_weight(folder: Path, marker: Path) -> Path:
    return changed(folder, "fc.weight", float("nan"))


@case("bad numbers")
def infinite_weight(folder: Path, marker: Path) -> Path:
    return changed(folder, "fc.bias", float("inf"))


@case("bad numbers")
def negative_variance(folder: Path, marker: Path) -> Path:
    return changed(folder, "bn1.running_var", -1.0)


@case("bad numbers", child=True)
def nan_weight_in_a_graph(folder: Path, marker: Path) -> Path:
    model = graph()
    values = np.full((5, 4), np.nan, np.float32)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "matrix"))
    return onnx_file(folder, model)


@case("bad numbers")
def weights_that_are_all_zero(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    state["fc.weight"].zero_()
    save_file(state, path)
    return path


# --- Another number of classes ---


@case("class count", num_classes=7)
def ten_instead_of_seven(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    save_file(weights(), path)
    return path


@case("class count")
def a_single_class(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    save_file(weights(classes=1), path)
    return path


@case("class count", child=True)
def a_graph_of_one_class(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph(classes=1))


@case("class count", num_classes=3, child=True)
def a_graph_of_four_instead_of_three(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph())


@case("class count")
def two_classifiers_that_disagree(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    state["fc.bias"] = torch.zeros(11)
    save_file(state, path)
    return path
