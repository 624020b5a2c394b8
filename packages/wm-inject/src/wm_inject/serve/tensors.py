"""Input tensors of a request: lists of JSON or little-endian bytes to arrays, nothing trusted."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import Any

import numpy as np

from wm_inject.runtime.onnx_model import Array, Port
from wm_inject.serve.models import DATATYPES

_KINDS: dict[str, set[type]] = {
    "float32": {int, float},
    "uint8": {int},
    "int64": {int},
    "bool": {bool},
}


def read_tensor(
    entry: dict[str, Any], port: Port, tail: memoryview, offset: int
) -> tuple[Array, int]:
    """One input of a request: the array, and where the bytes of the next tensor begin.

    Args:
        entry: The input as the JSON describes it.
        port: The input of the model that it is for.
        tail: All binary tensors.
        offset: Where in the tail its bytes would begin.

    Raises:
        ValueError: Anything odd.
    """
    expected = DATATYPES[port.dtype.name]
    if entry.get("datatype") != expected:
        got = short(entry.get("datatype"))
        raise ValueError(f"expected {port.name} in {expected}, got {got}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or {*map(type, shape)} != {int}:
        raise ValueError(f"expected the shape of {port.name} as 1 to 8 numbers")
    if min(shape) < 1:
        raise ValueError(f"expected {port.name} with at least one image, got shape {shape}")
    size = parameters(entry, port.name).get("binary_data_size")
    if ("data" in entry) == (size is not None):
        raise ValueError(f"expected either data or binary_data_size for {port.name}")
    if size is None:
        return _from_json(entry["data"], port, shape), offset
    nbytes = prod(shape) * port.dtype.itemsize
    if type(size) is not int or size != nbytes:
        raise ValueError(
            f"expected binary_data_size {nbytes} for {port.name} of shape {shape}, "
            f"got {short(size)}"
        )
    if offset + size > len(tail):
        raise ValueError(
            f"expected {size} bytes of {port.name} after the JSON, got {len(tail) - offset}"
        )
    return _from_bytes(tail[offset : offset + size], port, shape), offset + size


def _from_bytes(data: memoryview, port: Port, shape: list[int]) -> Array:
    """Little-endian bytes as an array, copied only where they must be."""
    if port.dtype == np.bool_ and np.frombuffer(data, np.uint8).max() > 1:
        raise ValueError(f"expected {port.name} as bytes 0 and 1, got another")
    array = np.frombuffer(data, port.dtype.newbyteorder("<")).astype(port.dtype, copy=False)
    # The JSON before it may have any length; ONNX Runtime expects whole numbers at whole places.
    return np.require(array, requirements="A").reshape(shape)


def _from_json(data: Any, port: Port, shape: list[int]) -> Array:
    """Flat or nested lists as an array."""
    name = port.name
    if not isinstance(data, list):
        raise ValueError(f"expected the data of {name} as a list, got {type(data).__name__}")
    if data and type(data[0]) is list:
        for length in shape[1:]:
            if {*map(type, data)} != {list} or {*map(len, data)} != {length}:
                raise ValueError(f"expected the data of {name} flat or nested as its shape {shape}")
            data = list(chain.from_iterable(data))
    if len(data) != prod(shape):
        raise ValueError(f"expected {prod(shape)} numbers of {name}, got {len(data)}")
    odd = {*map(type, data)} - _KINDS[port.dtype.name]
    if odd:
        kinds = " or ".join(sorted(kind.__name__ for kind in _KINDS[port.dtype.name]))
        got = ", ".join(sorted(kind.__name__ for kind in odd))
        raise ValueError(f"expected the data of {name} as {kinds}, got {got}")
    if port.dtype == np.float32:
        with np.errstate(over="ignore"):  # infinity is refused with everything outside [0, 1]
            return np.array(data, np.float64).astype(np.float32).reshape(shape)
    try:
        array = np.array(data, np.int64).reshape(shape)
    except OverflowError:
        raise ValueError(f"expected the data of {name} within 64 bits, got more") from None
    if port.dtype == np.uint8 and not (array.min() >= 0 and array.max() <= 255):
        raise ValueError(f"expected the data of {name} in 0 .. 255, got another")
    return array.astype(port.dtype, copy=False)


def parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a request, an input or an output; none if it has none."""
    values = entry.get("parameters")
    return {} if values is None else mapping(values, f"the parameters of {where}")


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object, and nothing else."""
    if not isinstance(value, dict):
        raise ValueError(f"expected {what} as a JSON object, got {type(value).__name__}")
    return value


def short(value: Any) -> str:
    """A client's value for a message, never much of it."""
    if isinstance(value, list | dict):
        return type(value).__name__
    return repr(value[:40] if isinstance(value, str) else value)
