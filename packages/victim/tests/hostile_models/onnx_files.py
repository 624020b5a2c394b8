"""ONNX files that name other files or claim sizes."""

import os
from pathlib import Path
from typing import Any

from onnx import TensorProto

from .case import case, put
from .graph import graph, onnx_file


def external(folder: Path, entries: dict[str, str], *, side: str | None = "side.bin") -> Path:
    """A model whose matrix lies in another file."""
    model = graph()
    tensor = model.graph.initializer[1]
    if side is not None:
        put(folder, side, tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return onnx_file(folder, model)


@case("external data")
def parent_folder(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "../../../../../../etc/hostname"})


@case("external data")
def absolute_path(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "/etc/hostname"})


@case("external data")
def symbolic_link(folder: Path, marker: Path) -> Path:
    (folder / "link.bin").symlink_to("/etc/hostname")
    return external(folder, {"location": "link.bin"})


@case("external data")
def hard_link(folder: Path, marker: Path) -> Path:
    path = external(folder, {"location": "hard.bin"})
    os.link(folder / "side.bin", folder / "hard.bin")
    return path


@case("external data")
def a_pipe(folder: Path, marker: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return external(folder, {"location": "pipe"})


@case("external data")
def a_pebibyte(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "length": str(2**50)})


@case("external data")
def attribute_of_a_class(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "__class__": "x"})


@case("external data")
def shorter_than_it_says(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "offset": "64"})


def with_tensor(folder: Path, **changes: Any) -> Path:
    """A model with one more weight, whose fields say what they like."""
    model = graph()
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    tensor.dims.extend(changes.get("dims", [1]))
    tensor.raw_data = changes.get("raw", bytes(4))
    tensor.data_type = changes.get("dtype", TensorProto.FLOAT)
    return onnx_file(folder, model)


@case("initialiser bomb")
def claims_four_terabytes(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[2**40])


@case("initialiser bomb")
def negative_length(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[-4])


@case("initialiser bomb")
def lengths_that_overflow(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[2**32, 2**32, 4])


@case("initialiser bomb")
def text_as_a_weight(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dtype=TensorProto.STRING)


@case("initialiser bomb")
def a_million_empty_nodes(folder: Path, marker: Path) -> Path:
    inner = b"\x0a\x00" * 1_000_000
    data = b"\x08\x09\x3a" + _varint(len(inner)) + inner + b"\x42\x02\x10\x11"
    return put(folder, "a.onnx", data)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])
