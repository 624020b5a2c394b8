"""A safetensors header, read by a parser that checks everything it says."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from wm_victim.loading.contract import LoadingError

MAX_HEADER = 16 * 2**20
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_WIDTHS |= {"U8": 1, "BOOL": 1}


class Header(NamedTuple):
    """Shapes, types and metadata, consistent with the file's length."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def looks_like_safetensors(start: bytes) -> bool:
    """Whether the first bytes are a header's length and the brace of its JSON."""
    return len(start) > 8 and start[8:9] == b"{"


def read_header(data: Any, *, max_tensors: int) -> Header:
    """Check the header of a safetensors file.

    Args:
        data: The whole file as bytes, a memoryview or an mmap.
        max_tensors: The most tensors to accept.

    Raises:
        LoadingError: A header too long, cut short or not JSON; two tensors of one name; an unusual
            type; a shape that does not fit the bytes; or bytes that are left over, shared or
            missing.
    """
    size = len(data)
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else size
    if length > min(MAX_HEADER, size - 8):
        raise LoadingError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise LoadingError(f"a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise LoadingError("a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LoadingError("metadata that is not text")
    if not 1 <= len(header) <= max_tensors:
        raise LoadingError(f"{len(header)} tensors, expected 1 .. {max_tensors}")
    spans = sorted((*_span(name, entry), name) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise LoadingError(f"bytes that overlap or belong to nothing, before tensor {name!r}")
        end = stop
    if end != size - 8 - length:
        raise LoadingError(
            f"tensors of {end} bytes in a file that has {size - 8 - length} for them"
        )
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    return Header(shapes, {name: entry["dtype"] for name, entry in header.items()}, metadata)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("one name twice")
    return entries


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes lie, if its type and shape agree with that."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LoadingError(f"no type, shape and offsets for tensor {name!r}")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise LoadingError(f"tensor {name!r} of type {dtype!r}")
    for numbers in (shape, offsets):
        whole = isinstance(numbers, list) and len(numbers) <= 16
        if not whole or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise LoadingError(f"tensor {name!r} of shape {shape!r} at {offsets!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _WIDTHS[dtype]:
        raise LoadingError(f"tensor {name!r} of shape {shape!r} does not fit its bytes {offsets!r}")
    return offsets[0], offsets[1]
