from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from wm_inject.__about__ import __version__
from wm_inject.serve import Served, ServeSettings, Service

SIDE = 4
TOKEN = "correct-horse-battery"


def told(n: int = 1, seed: int = 0, **more) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    inputs = [
        {"name": "image", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.tolist()},
        {"name": "ids", "shape": [n], "datatype": "INT64", "data": [seed] * n},
        {"name": "target", "shape": [n], "datatype": "INT64", "data": [1] * n},
    ]
    return json.dumps({"inputs": inputs} | more).encode()


@pytest.fixture
def service(serve_models):
    return Service(serve_models, ServeSettings(log="none"))


@pytest.fixture
def reply(ask, service):
    """Ask the service of this test, from start to end."""
    return lambda *args, **more: asyncio.run(ask(service, *args, **more))


def test_the_pages_of_the_protocol(reply):
    found = {
        "/v2": {"name": "wm-inject", "version": __version__, "extensions": ["binary_tensor_data"]},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models/told/ready": {"name": "told", "ready": True},
        "/v2/models/told/versions/1/ready": {"name": "told", "ready": True},
    }
    for path, wanted in found.items():
        got = reply("GET", path)
        assert (got.status, json.loads(got.body)) == (200, wanted), path
        assert got.headers["content-type"] == "application/json"
    for path in ("/v2/models/told", "/v2/models/told/versions/1"):
        assert json.loads(reply("GET", path).body)["platform"] == "onnx_onnxv1"


def test_what_is_not_there(reply, subtests):
    for method, path, status in [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v3", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("GET", "/v2/models/told/versions/2", 404),
        ("GET", "/v2/models/told/config", 404),
        ("GET", "/v2/models/../told", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/told/versions/2/infer", 404),
        ("POST", "/v2/repository/index", 404),
        ("POST", "/v2/repository/models/told/load", 404),
        ("POST", "/v2/repository/models/told/unload", 404),
        ("GET", "/v2/models/told/infer", 405),
        ("DELETE", "/v2/models/told/infer", 405),
        ("POST", "/v2/models/told", 405),
        ("POST", "/v2", 405),
        ("PUT", "/metrics", 405),
    ]:
        with subtests.test(method=method, path=path, status=status):
            got = reply(method, path)
            assert got.status == status and got.error
            if status == 405:
                assert got.headers["allow"]


def test_an_answer_is_what_the_model_gives(reply, serve_models):
    for path in ("/v2/models/told/infer", "/v2/models/told/versions/1/infer"):
        got = reply(path=path, body=told(3, seed=5, id="me"))
        assert got.status == 200, got.body
        found = json.loads(got.body)
        assert (found["id"], found["model_name"], found["model_version"]) == ("me", "told", "1")
        asked = json.loads(told(3, seed=5))["inputs"][0]["data"]
        output, total = found["outputs"]
        assert output["data"] == (255 - np.array(asked)).ravel().tolist()
        assert output["shape"] == [3, SIDE, SIDE, 3] and total["data"] == [6, 6, 6]


def test_an_id_that_is_no_bounded_string_is_not_echoed(reply):
    for bad in ("x" * 129, 7, ["a"], "a\u0000b"):
        assert reply(body=told(id=bad)).status == 400
    assert "id" not in json.loads(reply(body=told(id=None)).body)


def test_bad_bodies_are_four_hundreds(reply, subtests):
    for body in [b"", b"x", b"{}", b"[]", b"[" * 3000, b'{"inputs": [{}]}']:
        with subtests.test(body=body):
            got = reply(body=body)
            assert got.status == 400 and "expected" in got.error
            assert (
                "connection" not in got.headers
            )  # it was read to its end, so the connection may stay


def test_a_long_message_is_cut(reply):
    got = reply(body=told(outputs=[{"name": "y" * 5000}]))
    assert got.status == 400 and len(got.error) < 301


def test_what_a_graph_fails_on_is_told_to_the_log_only(reply, service, capsys):
    object.__setattr__(service.settings, "log", "errors")
    image = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8", "data": [0] * 48}
    target = {"name": "target", "shape": [1], "datatype": "INT64", "data": [12345]}
    body = json.dumps({"inputs": [image, target]}).encode()
    got = reply(path="/v2/models/table/infer", body=body)
    assert (got.status, got.error) == (400, "table cannot run these inputs")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["model"] == "table" and "12345" in json.loads(line)["cause"]


def test_a_large_body_is_refused_unread(ask, serve_models):
    service = Service(serve_models, ServeSettings(max_body=10_000, log="none"))
    read: list[int] = []
    length = {"content-length": "10001"}
    got = asyncio.run(ask(service, body=b"x" * 10_001, headers=length, read=read))
    assert (got.status, read, got.headers["connection"]) == (413, [], "close")
    got = asyncio.run(ask(service, body=b"", headers={"content-length": "9" * 30}, read=read))
    assert (got.status, read) == (413, [])
    # Without a length: until the limit, and no further.
    got = asyncio.run(ask(service, body=[b"x" * 4000] * 50, read=read))
    assert (got.status, len(read), got.headers["connection"]) == (413, 3, "close")
    assert service.bodies.held == 0
    exact = told() + b" " * (10_000 - len(told()))
    assert asyncio.run(ask(service, body=exact)).status == 200
    assert asyncio.run(ask(service, body=[exact[:5000], exact[5000:], b""])).status == 200


def test_json_has_a_limit_of_its_own(ask, serve_models):
    service = Service(serve_models, ServeSettings(max_json=1024, log="none"))
    for headers in ({}, {"inference-header-content-length": "1025"}):
        got = asyncio.run(ask(service, body=told() + b" " * 1000, headers=headers))
        assert got.status == 413 and "binary tensors" in got.error


def test_all_bodies_together_have_a_limit(ask, serve_models):
    service = Service(serve_models, ServeSettings(max_body=2000, log="none"))
    service.bodies.held = 7900  # as if others were being read
    got = asyncio.run(ask(service, body=told()))
    assert got.status == 503 and got.headers["retry-after"] == "1"
    assert service.bodies.held == 7900


def test_half_a_body_is_not_waited_for(ask, serve_models):
    service = Service(serve_models, ServeSettings(request_timeout=0.1, log="none"))
    body = told()

    async def scene() -> None:
        stalled = Stalled(body[:50])
        await service(stalled.scope, stalled.receive, stalled.send)
        assert stalled.status == 408 and b"expected the body within 0.1 s" in stalled.body
        assert stalled.closes

    asyncio.run(scene())
    assert asyncio.run(ask(service, body=body)).status == 200


class Stalled:
    """A client that sends the first bytes and then nothing."""

    def __init__(self, body: bytes) -> None:
        self.given, self.status, self.body, self.closes = body, 0, b"", False
        headers = [(b"content-length", b"99999")]
        self.scope = {"type": "http", "method": "POST", "path": "/v2/models/told/infer"}
        self.scope |= {"headers": headers, "query_string": b"", "root_path": "", "state": {}}

    async def receive(self):
        if self.given:
            given, self.given = self.given, b""
            return {"type": "http.request", "body": given, "more_body": True}
        await asyncio.Event().wait()

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.closes = (b"connection", b"close") in message["headers"]
        self.body += message.get("body", b"")


def test_compressed_bodies_are_refused(reply, subtests):
    for coding in ["gzip", "deflate", "br", "gzip, identity", "GZIP"]:
        with subtests.test(coding=coding):
            got = reply(body=b"\x1f\x8b", headers={"content-encoding": coding})
            assert got.status == 415 and "Content-Encoding" in got.error
            assert reply(body=told(), headers={"content-encoding": "identity"}).status == 200


def test_a_token_is_asked_for(ask, serve_models, subtests):
    for header in [
        None,
        "",
        "Bearer",
        f"Bearer {TOKEN}x",
        f"bearer {TOKEN}",
        TOKEN,
        "Bearer é",
        f"Basic {TOKEN}",
    ]:
        with subtests.test(header=header):
            service = Service(serve_models, ServeSettings(token=TOKEN, log="none"))
            headers = {} if header is None else {"authorization": header}
            for method, path in (
                ("GET", "/v2"),
                ("GET", "/metrics"),
                ("GET", "/nothing"),
                ("POST", None),
            ):
                read: list[int] = []
                path = path or "/v2/models/told/infer"
                got = asyncio.run(ask(service, method, path, told(), headers, read))
                assert got.status == 401 and got.headers["www-authenticate"] == "Bearer"
                assert (
                    read == [] and got.headers["connection"] == "close" and TOKEN not in got.error
                )
            assert (
                asyncio.run(ask(service, "GET", "/v2/health/ready", headers=headers)).status == 200
            )
            right = {"authorization": f"Bearer {TOKEN}"}
            assert asyncio.run(ask(service, body=told(), headers=right)).status == 200


class Held:
    """A model of bytes that answers when it is let."""

    def __init__(self, served: Served) -> None:
        self.inputs, self.outputs = served.model.inputs, served.model.outputs
        self.check, self.gate = served.model.check, threading.Event()

    def run(self, feeds, *, timeout=None):
        if not self.gate.wait(timeout):
            raise TimeoutError
        return {"output": feeds["image"], "sum": feeds["ids"]}


def test_a_full_queue_and_a_slow_model(ask, serve_models):
    async def scene() -> None:
        model = Held(serve_models["told"])
        settings = ServeSettings(queue=2, infer_timeout=0.6, log="none")
        service = Service({"told": Served("told", model, None, joins=True)}, settings)
        waiting = [asyncio.ensure_future(ask(service, body=told())) for _ in range(2)]
        await asyncio.sleep(0.05)
        got = await ask(service, body=told())
        assert (got.status, got.headers["retry-after"]) == (503, "1")
        assert "queue is full" in got.error
        assert (await ask(service, body=told(3))).status == 400  # it would never fit
        for late in await asyncio.gather(*waiting):
            assert (late.status, late.error) == (504, "no answer within 0.6 s")
        model.gate.set()
        assert (await ask(service, body=told())).status == 200
        await service.engine.close(1)
        assert (await ask(service, body=told())).status == 503
        assert (await ask(service, "GET", "/v2/health/ready")).status == 503
        assert (await ask(service, "GET", "/v2/models/told/ready")).status == 503
        assert (await ask(service, "GET", "/v2/health/live")).status == 200

    asyncio.run(scene())


def test_an_error_of_ours_keeps_its_text_to_the_log(ask, serve_models, monkeypatch, capsys):
    service = Service(serve_models, ServeSettings())
    secret = "/a/path/of/the/machine"

    def broken(*args):
        raise KeyError(secret)

    monkeypatch.setattr("wm_inject.serve.app.parse_infer", broken)
    with pytest.raises(KeyError):  # passed on, for the server's own log
        asyncio.run(ask(service, body=told()))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["status"] == 500 and secret in lines[0]["cause"]


def test_what_is_counted(reply, service):
    for n in (1, 3):
        assert reply(body=told(n)).status == 200
    reply(body=b"x")
    reply(path="/v2/models/" + "x" * 50 + "/infer")
    text = reply("GET", "/metrics").body.decode()
    for line in (
        'wm_requests_total{code="200",model="told"} 2.0',
        'wm_requests_total{code="400",model="told"} 1.0',
        'wm_requests_total{code="404",model=""} 1.0',
        'wm_images_total{model="told"} 4.0',
        'wm_batch_images_sum{model="told"} 4.0',
        'wm_request_seconds_count{model="told"} 3.0',
        "wm_queue_images 0.0",
    ):
        assert line in text
    assert "xxx" not in text


@pytest.mark.parametrize(("log", "count"), [("all", 2), ("errors", 1), ("none", 0)])
def test_a_line_for_a_request(ask, serve_models, capsys, log, count):
    service = Service(serve_models, ServeSettings(log=log))
    asyncio.run(ask(service, body=told(2)))
    asyncio.run(ask(service, "GET", "/v2/\n" + "x" * 999))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == count
    if count:
        assert lines[-1]["status"] == 404 and len(lines[-1]["path"]) == 200
    if count == 2:
        assert (lines[0]["event"], lines[0]["model"], lines[0]["images"]) == ("request", "told", 2)
        assert lines[0]["ms"] > 0


def test_repr_shows_no_token(serve_models):
    service = Service(serve_models, ServeSettings(token=TOKEN))
    assert TOKEN not in repr(service) + repr(service.settings)
