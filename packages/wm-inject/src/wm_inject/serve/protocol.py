"""Open Inference Protocol v2 over HTTP: a body to arrays and back, as JSON or with binary tensors.

Every message of a client is taken for hostile: whatever is odd is a ValueError of one line.
Source: the Open Inference Protocol, REST, and its binary tensor data extension.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson

from wm_inject.runtime.onnx_model import Array
from wm_inject.serve.models import DATATYPES, VERSION, Served
from wm_inject.serve.tensors import mapping, parameters, read_tensor, short

HEADER_LENGTH = "inference-header-content-length"
_ID_LIMIT = 128
_NOT_OFFERED = ("classification", "shared_memory_region")


class Wanted(NamedTuple):
    """An output that the client asked for."""

    name: str
    binary: bool


class InferRequest(NamedTuple):
    """A request that may be run."""

    id: str | None
    feeds: dict[str, Array]
    images: int
    outputs: tuple[Wanted, ...]


def split_body(body: bytes, header_length: str | None) -> tuple[bytes | memoryview, memoryview]:
    """The JSON of a body and the tensors behind it.

    Args:
        body: All of it.
        header_length: The header Inference-Header-Content-Length, None if there is none.

    Raises:
        ValueError: That header is no number, or more than there is.
    """
    if header_length is None:
        return body, memoryview(b"")
    digits = header_length.isascii() and header_length.isdigit() and len(header_length) < 16
    if not digits or int(header_length) > len(body):
        raise ValueError(
            f"expected Inference-Header-Content-Length in 0 .. {len(body)}, "
            f"got {short(header_length)}"
        )
    whole = memoryview(body)
    return whole[: int(header_length)], whole[int(header_length) :]


def parse_infer(head: bytes | memoryview, tail: memoryview, served: Served) -> InferRequest:
    """Read an inference request.

    Args:
        head: Its JSON.
        tail: The binary tensors that follow it.
        served: The model that is asked.

    Raises:
        ValueError: Anything that the model must not be run on.
    """
    try:
        message = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"expected JSON: {error}") from None
    message = mapping(message, "the request")
    entries = message.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise ValueError("expected inputs as a list of at least one tensor")
    ports = {port.name: port for port in served.model.inputs}
    feeds: dict[str, Array] = {}
    offset = 0
    for entry in entries:
        port = ports.get(_name(entry, "input"))
        if port is None:
            wanted = ", ".join(ports)
            raise ValueError(f"expected the inputs {wanted}, got {short(entry['name'])}")
        if port.name in feeds:
            raise ValueError(f"expected each input once, got {port.name} twice")
        feeds[port.name], offset = read_tensor(entry, port, tail, offset)
    if offset != len(tail):
        raise ValueError(f"expected {offset} bytes of tensors after the JSON, got {len(tail)}")
    served.check(feeds)
    images = len(next(iter(feeds.values())))
    return InferRequest(_id(message), feeds, images, _outputs(message, served))


def encode_infer(
    request: InferRequest, served: Served, found: Mapping[str, Array]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where tensors follow it."""
    outputs: list[dict[str, Any]] = []
    tensors: list[Array] = []
    for name, binary in request.outputs:
        array = np.ascontiguousarray(found[name])
        entry: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": array.shape,
        }
        if binary:
            if sys.byteorder == "big":
                array = array.byteswap()
            tensors.append(array)
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            entry["data"] = array.reshape(-1)
        outputs.append(entry)
    answer: dict[str, Any] = {"model_name": served.name, "model_version": VERSION}
    if request.id is not None:
        answer["id"] = request.id
    head = orjson.dumps({**answer, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tensors:
        return head, None
    return b"".join([head, *tensors]), len(head)  # type: ignore[list-item]


def _outputs(message: dict[str, Any], served: Served) -> tuple[Wanted, ...]:
    """What to answer with; everything if the client names nothing."""
    usual = _flag(parameters(message, "the request"), "binary_data_output", default=False)
    entries = message.get("outputs")
    if entries is None or entries == []:
        return tuple(Wanted(port.name, usual) for port in served.model.outputs)
    if not isinstance(entries, list):
        raise ValueError(f"expected outputs as a list, got {type(entries).__name__}")
    known = {port.name for port in served.model.outputs}
    found: dict[str, Wanted] = {}
    for entry in entries:
        name = _name(entry, "output")
        if name not in known:
            raise ValueError(f"expected outputs of {', '.join(sorted(known))}, got {short(name)}")
        if name in found:
            raise ValueError(f"expected each output once, got {name} twice")
        options = parameters(entry, name)
        for other in _NOT_OFFERED:
            if other in options:
                raise ValueError(f"expected no parameter {other} for {name}: it is not offered")
        found[name] = Wanted(name, _flag(options, "binary_data", default=usual))
    return tuple(found.values())


def _id(message: dict[str, Any]) -> str | None:
    """The client's own mark on a request, which the answer repeats."""
    given = message.get("id")
    if given is None:
        return None
    if not isinstance(given, str) or len(given) > _ID_LIMIT or not given.isprintable():
        raise ValueError(f"expected id as a printable string of up to {_ID_LIMIT} characters")
    return given


def _name(entry: Any, what: str) -> str:
    name = mapping(entry, f"each {what}").get("name")
    if not isinstance(name, str):
        raise ValueError(f"expected the name of each {what} as a string, got {short(name)}")
    return name


def _flag(options: dict[str, Any], name: str, *, default: bool) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {short(value)}")
    return value
