"""What the tests of the service share: small graphs, made without torch, and a way to ask."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

SIDE = 4


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        found = json.loads(self.body)
        assert list(found) == ["error"] and "\n" not in found["error"]
        return found["error"]


async def ask_service(
    service: Any,
    method: str = "POST",
    path: str = "/v2/models/told/infer",
    body: bytes | list[bytes] = b"",
    headers: dict[str, str] | None = None,
    read: list[int] | None = None,
) -> Reply:
    """One request to an ASGI application; ``read`` counts the pieces of the body that it took."""
    pieces = [body] if isinstance(body, bytes) else list(body)
    given = dict(headers or {})
    if isinstance(body, bytes):
        given.setdefault("content-length", str(len(body)))
    else:
        given.setdefault("transfer-encoding", "chunked")
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()  # a client that says nothing more
        if read is not None:
            read.append(1)
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    await service(scope, receive, send)
    assert sent[0]["type"] == "http.response.start"
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return Reply(sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]))


def graph(
    path: Path,
    inputs: list[tuple[Any, ...]],
    outputs: list[tuple[Any, ...]],
    nodes: list[tuple[Any, ...]],
    constants: dict[str, np.ndarray] | None = None,
    metadata: Any = None,
) -> Path:
    """Write an ONNX file; a node is (operator, its inputs, its outputs, attributes)."""
    from onnx import helper, numpy_helper, save

    made = helper.make_graph(
        [helper.make_node(op, i, o, **(more[0] if more else {})) for op, i, o, *more in nodes],
        "g",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if metadata is not None:
        helper.set_model_props(model, {"wm": json.dumps(metadata)})
    save(model, str(path))
    return path


@pytest.fixture(scope="session")
def serve_graphs(tmp_path_factory) -> dict[str, Path]:
    """Models whose answers are known.

    "told" gives the inverse of uint8 images, and ids + target; "float" half of a float image of any
    size, and where it is bright; "table" fails on a target above 4; "one" takes one image; "deep"
    works for a while.
    """
    home = tmp_path_factory.mktemp("graphs")
    f32, u8, i64, boolean = 1, 2, 7, 9
    stored, any_size = ["N", SIDE, SIDE, 3], ["N", 3, "h", "w"]
    large = ["N", 1, 256, 256]
    mean = np.full((256, 256), 1 / 256, np.float32)
    steps = [f"s{i}" for i in range(150)]
    return {
        "told": graph(
            home / "told.onnx",
            [("image", u8, stored), ("ids", i64, ["N"]), ("target", i64, ["N"])],
            [("output", u8, stored), ("sum", i64, ["N"])],
            [("BitwiseNot", ["image"], ["output"]), ("Add", ["ids", "target"], ["sum"])],
            metadata={"kind": "told", "config": {"num_classes": 5}},
        ),
        "float": graph(
            home / "float.onnx",
            [("image", f32, any_size)],
            [("output", f32, any_size), ("bright", boolean, any_size)],
            [("Mul", ["image", "half"], ["output"]), ("Greater", ["image", "half"], ["bright"])],
            {"half": np.float32(0.5).reshape(1)},
        ),
        "table": graph(
            home / "table.onnx",
            [("image", u8, stored), ("target", i64, ["N"])],
            [("output", u8, stored), ("score", f32, ["N"])],
            [("Identity", ["image"], ["output"]), ("Gather", ["scores", "target"], ["score"])],
            {"scores": np.arange(5, dtype=np.float32)},
            metadata=["not", "what", "one", "expects"],
        ),
        "judge": graph(
            home / "judge.onnx",
            [("image", u8, stored), ("target", i64, ["N"])],
            [("score", f32, ["N"])],
            [("Gather", ["scores", "target"], ["score"])],
            {"scores": np.arange(5, dtype=np.float32)},
            metadata={"detector": {"threshold": 2.5, "false_positive_rate": 0.01}},
        ),
        "one": graph(
            home / "one.onnx",
            [("image", boolean, [1, SIDE])],
            [("output", boolean, [1, SIDE])],
            [("Not", ["image"], ["output"])],
        ),
        "deep": graph(
            home / "deep.onnx",
            [("image", f32, large)],
            [("output", f32, large)],
            [
                *(
                    ("MatMul", [a, "m"], [b])
                    for a, b in zip(["image", *steps], steps, strict=False)
                ),
                ("Identity", [steps[-1]], ["output"]),
            ],
            {"m": mean},
        ),
    }


@pytest.fixture(scope="session")
def serve_models(serve_graphs):
    from wm_inject.serve import open_models

    return open_models(serve_graphs)


@pytest.fixture(scope="session")
def ask():
    return ask_service


@pytest.fixture(scope="session")
def make_graph():
    return graph
