"""Thousands of odd requests, drawn from a seed: none may bring an answer of 5xx."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import numpy as np
import orjson
import pytest

from wm_inject.serve import ServeSettings, Service

SIDE = 4
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 5, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0,
    1e308, "", "x", "FP32", "UINT8", "INT64", "BOOL", "BYTES", "image", "\u0000", "😀" * 50,
    "y" * 999, [], [[]], [[[[[]]]]], {}, {"a": 1}, [None], [0] * 48, [0.5] * 48, [1, [2]],
    ["a"] * 48,
]  # fmt: skip
HEADER = "inference-header-content-length"


def right(draw: random.Random) -> tuple[str, dict[str, Any], bytes | None]:
    """A model's name, a request that it takes, and tensors in binary or None."""
    name = draw.choice(["told", "float", "table", "one"])
    n = 1 if name == "one" else draw.randint(1, 3)
    rng = np.random.default_rng(draw.randrange(2**32))
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    if name == "float":
        size = (n, 3, draw.randint(1, 4), draw.randint(1, 4))
        arrays["image"] = ("FP32", rng.random(size, dtype=np.float32))
    elif name == "one":
        arrays["image"] = ("BOOL", rng.random((1, SIDE)) > 0.5)
    else:
        size = (n, SIDE, SIDE, 3)
        arrays["image"] = ("UINT8", rng.integers(0, 256, size, dtype=np.uint8))
        arrays["target"] = ("INT64", rng.integers(0, 5, n))
    if name == "told":
        arrays["ids"] = ("INT64", rng.integers(-(2**62), 2**62, n))
    inputs, tail, binary = [], b"", draw.random() < 0.4
    for key, (datatype, array) in arrays.items():
        entry: dict[str, Any] = {"name": key, "shape": list(array.shape), "datatype": datatype}
        if binary and draw.random() < 0.7:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = (array if draw.random() < 0.5 else array.ravel()).tolist()
        inputs.append(entry)
    asked: dict[str, Any] = {"inputs": inputs}
    if draw.random() < 0.5:
        asked["id"] = str(draw.random())
    if draw.random() < 0.3:
        asked["outputs"] = [{"name": "output", "parameters": {"binary_data": draw.random() < 0.5}}]
    if draw.random() < 0.3:
        asked["parameters"] = {"binary_data_output": draw.random() < 0.5}
    return name, asked, tail if binary else None


def spoil(value: Any, draw: random.Random) -> Any:
    """Change one thing, somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        chance = draw.random()
        if chance < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if chance < 0.14:
            return value | {draw.choice(["data", "shape", "parameters", "id", "z"]): odd(draw)}
        return value | {key: spoil(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        chance = draw.random()
        if chance < 0.1:
            return value[:place] + value[place + 1 :]
        if chance < 0.2:
            return value + value[place : place + 1]
        return [*value[:place], spoil(value[place], draw), *value[place + 1 :]]
    return odd(draw)


def odd(draw: random.Random) -> Any:
    if draw.random() < 0.1:
        value: Any = draw.choice([0, [], "x"])
        for _ in range(draw.choice([3, 70, 500, 2000])):
            value = [value]
        return value
    return draw.choice(ODD)


def text(value: Any) -> bytes:
    """JSON as a hostile client may write it: any number, any depth."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b'{"inputs":' * 2000


def flip(body: bytes, draw: random.Random) -> bytes:
    changed = bytearray(body or b"x")
    for _ in range(draw.randint(1, 4)):
        place, chance = draw.randrange(len(changed) + 1), draw.random()
        if chance < 0.5 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif chance < 0.75:
            del changed[place:]
        else:
            changed[place:place] = draw.randbytes(draw.randint(1, 9))
        changed = changed or bytearray(b"x")
    return bytes(changed)


def one(draw: random.Random) -> tuple[str, str, list[bytes], dict[str, str], bytes]:
    """Method, path, pieces of the body, headers, and what stands for the JSON in it."""
    name, asked, tail = right(draw)
    kind = draw.random()
    if 0.3 <= kind < 0.75:
        for _ in range(draw.randint(1, 2)):
            asked = spoil(asked, draw)
    head, rest = text(asked), tail or b""
    headers = {} if tail is None else {HEADER: str(len(head))}
    method, path = "POST", f"/v2/models/{name}/infer"
    if 0.75 <= kind < 0.9:
        if draw.random() < 0.6:
            head = flip(head, draw)
        else:
            rest = flip(rest, draw)
    elif kind >= 0.9:
        method = draw.choice(["GET", "POST", "PUT", "HEAD", "BREW"])
        path = draw.choice([path, path[:-1], "/v2", "/metrics", "/v2/models/%00", "/v2/ä\n", "//"])
        lengths = ["0", "-1", "7", "x", "99999999", "", "0x10", str(len(head) - 1)]
        headers = {HEADER: draw.choice(lengths), "content-type": draw.choice(["", "a/b", "é"])}
        if draw.random() < 0.2:
            headers["content-length"] = draw.choice(["0", "10", "99999999999", "-5", "zz"])
    body = head + rest
    cut = draw.randrange(len(body) + 1) if draw.random() < 0.3 else 0
    return method, path, [body[:cut], body[cut:]] if cut else [body], headers, head


async def fuzz(ask, service: Service, count: int, seed: int) -> Counter:
    draw, found = random.Random(seed), Counter()

    async def send() -> None:
        method, path, pieces, headers, head = one(draw)
        try:
            orjson.loads(head)
            found["json"] += 1
        except orjson.JSONDecodeError:
            pass
        got = await ask(service, method, path, pieces, headers)
        found[got.status] += 1
        if got.status == 200 and path.endswith("/infer"):
            found["valid"] += 1
        elif got.status >= 400 and method != "HEAD":
            assert 0 < len(got.error) < 320 and "Traceback" not in got.error
            assert ".onnx" not in got.error and ".py" not in got.error

    for _ in range(count // 8):  # eight at once, so that they share batches
        await asyncio.gather(*(send() for _ in range(8)))
    await service.engine.close(1)
    return found


def check(found: Counter, count: int) -> None:
    shown = dict(sorted(found.items(), key=str))
    assert sum(n for key, n in found.items() if isinstance(key, int)) == count, shown
    assert not [key for key in found if isinstance(key, int) and key >= 500], shown
    assert found["json"] >= 0.3 * count and found["valid"] >= 0.1 * count, shown
    print(f"{count} requests: {shown}")  # noqa: T201


def settings() -> ServeSettings:
    return ServeSettings(max_body=20_000, log="none")


@pytest.mark.integration
def test_no_odd_request_brings_a_server_error(ask, serve_models):
    check(asyncio.run(fuzz(ask, Service(serve_models, settings()), 3200, seed=0)), 3200)


@pytest.mark.slow
def test_no_odd_request_of_many_brings_a_server_error(ask, serve_models):
    check(asyncio.run(fuzz(ask, Service(serve_models, settings()), 50_000, seed=1)), 50_000)
